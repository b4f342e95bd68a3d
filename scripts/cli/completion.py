"""``perdure completion``: what a shell needs to complete commands and flags."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, FishComplete, ZshComplete

VARIABLE = "_PERDURE_COMPLETE"
SHELLS = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@click.command(
    epilog='\b\nExamples:\n  eval "$(perdure completion bash)"          # in ~/.bashrc\n'
    '  eval "$(perdure completion zsh)"           # in ~/.zshrc\n'
    "  perdure completion fish > ~/.config/fish/completions/perdure.fish"
)
@click.argument("shell", type=click.Choice(list(SHELLS)))
def completion(shell: str) -> None:
    """Print the completion script for bash (4.4 or later), zsh or fish."""
    from ..main import perdure

    maker = SHELLS[shell](perdure, {}, "perdure", VARIABLE)
    # Not source(): for bash it runs bash to ask for its version, which may not be here.
    click.echo(maker.source_template % maker.source_vars())
