// Sorts the table of classes by the column whose heading is pressed; pressed again, the other way round.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const numeric = heading.classList.contains("n");
      const current = heading.getAttribute("aria-sort");
      const first = numeric ? "descending" : "ascending";
      const second = numeric ? "ascending" : "descending";
      const direction = current === first ? second : first;
      const sign = direction === "ascending" ? 1 : -1;
      const key = (row) => (numeric ? Number(row.cells[column].dataset.value) : row.cells[column].textContent.trim());
      const compare = (a, b) => (numeric ? key(a) - key(b) : key(a).localeCompare(key(b)));
      body.append(...[...body.rows].sort((a, b) => sign * compare(a, b)));
      for (const other of headings) other.setAttribute("aria-sort", other === heading ? direction : "none");
      document.getElementById("sorted").textContent = `Sorted by ${heading.textContent.trim()}, ${direction}.`;
    });
  });
}
