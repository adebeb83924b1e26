import click
from click.shell_completion import get_completion_class

from g4kit.output import print_data


@click.command("completion", short_help="Print the script that makes a shell complete g4kit's commands.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the script that makes a shell complete g4kit's commands, options and run ids.

    \b
    Examples:
      g4kit completion bash >> ~/.bashrc
      g4kit completion zsh >> ~/.zshrc
      g4kit completion fish > ~/.config/fish/completions/g4kit.fish
    """
    from g4kit.main import cli

    complete = get_completion_class(shell)
    if complete is None:
        raise click.UsageError(f"shell: got {shell}; write bash, zsh or fish.")
    print_data(complete(cli, {}, "g4kit", "_G4KIT_COMPLETE").source())
