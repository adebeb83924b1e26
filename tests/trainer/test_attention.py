"""The kernels that a run takes, and the sequences that the vision tower's batch is seen as."""

from typing import Any

import pytest
import torch

from g4trainer import attention
from g4trainer.attention import VARLEN, choose_attention, sequence_starts, varlen_attention
from g4trainer.vram import EAGER_BELOW_TOKENS, AttentionSetting

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Recorder:
    """Stands in for the model: only its setter matters here."""

    def set_attn_implementation(self, names: dict[str, str]) -> None:
        self.names = names


@pytest.mark.parametrize(
    ("setting", "tokens", "device", "text", "vision"),
    [
        ("auto", EAGER_BELOW_TOKENS - 1, CUDA, "eager", VARLEN),
        ("auto", EAGER_BELOW_TOKENS, CUDA, "sdpa", VARLEN),
        ("sdpa", 100, CUDA, "sdpa", VARLEN),
        ("eager", 5000, CUDA, "eager", VARLEN),
        ("auto", 100, CPU, "sdpa", "sdpa"),
    ],
)
def test_the_kernel_follows_recipe_length_and_device(
    setting: AttentionSetting, tokens: int, device: torch.device, text: str, vision: str
) -> None:
    model = Recorder()
    chosen = choose_attention(model, setting, tokens=tokens, device=device)
    assert chosen == model.names == {"text_config": text, "vision_config": vision}


def test_each_row_is_its_patches_and_then_its_padding() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert sequence_starts(mask, 2, 3, CPU).tolist() == [0, 2, 3, 6, 6]
    assert sequence_starts(None, 2, 3, CPU).tolist() == [0, 3, 3, 6, 6]


def test_valid_positions_attend_to_each_other_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against scaled_dot_product_attention with a mask; Flash Attention itself runs on CUDA only."""
    monkeypatch.setattr(attention, "varlen_attn", reference_varlen)
    query, key, value = (torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    output, _ = varlen_attention(torch.nn.Identity(), query, key, value, mask, scaling=1.0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask[:, None, None, :], scale=1.0
    ).transpose(1, 2)
    assert output.shape == expected.shape
    torch.testing.assert_close(output[mask], expected[mask])


def reference_varlen(query: Any, key: Any, value: Any, starts: Any, _: Any, *lengths: int, **options: Any) -> Any:
    assert lengths == (5, 5)
    output = torch.empty_like(query)
    for begin, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        parts = [tensor[begin:end].transpose(0, 1) for tensor in (query, key, value)]
        output[begin:end] = torch.nn.functional.scaled_dot_product_attention(*parts, **options).transpose(0, 1)
    return output
