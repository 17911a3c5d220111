"""Finds or installs ComfyUI and fills `.venv` with what the pack needs; standard library only."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
VENV = ROOT / ".venv"
HOME_INSTALL = Path.home() / "comfy" / "ComfyUI"

COMFYUI_VERSION = "0.33.0"
COMFYUI_FLOOR = (0, 33)
# The three are released together, and later versions of torch have no matching torchaudio,
# which ComfyUI imports.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAMS = {"chromium": BROWSERS, "redis-server": ("redis-server",)}  # Debian's packages


class SetupError(RuntimeError):
    """Set-up cannot go on; the message is one sentence with the remedy."""


def say(message: str) -> None:
    """Prints one progress line at once, also into a pipe."""
    print(f"[qwen-vram] {message}", flush=True)


# ------------------------------------------------------------------------------ where things are
def venv_python() -> Path:
    """The interpreter of `.venv`, whether or not it exists yet."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def inside_venv() -> bool:
    """Whether this very process runs on the interpreter of `.venv`."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def _is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy" / "ldm").is_dir()


def find_comfyui() -> Path | None:
    """The ComfyUI that COMFYUI_PATH names, the one around this pack, or one in the home folder."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        path = Path(named).expanduser().absolute()
        if not _is_comfyui(path):
            raise SetupError(
                f"COMFYUI_PATH is {named!r}, which holds no ComfyUI (no main.py and comfy/ in it): "
                "correct the variable or unset it."
            )
        return path
    candidates = [HOME_INSTALL, Path.home() / "ComfyUI"]
    if ROOT.parent.name == "custom_nodes":
        candidates.insert(0, ROOT.parent.parent)
    return next((path for path in candidates if _is_comfyui(path)), None)


def required_comfyui() -> Path:
    """`find_comfyui` for a program that cannot go on without. Raises SetupError, SystemExit."""
    found = find_comfyui()
    if found is None:
        raise SystemExit("ComfyUI was not found. Set COMFYUI_PATH.")
    return found


def comfyui_version(path: Path) -> tuple[int, ...]:
    """The version of a ComfyUI folder as numbers, empty if the folder does not tell."""
    file = path / "comfyui_version.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    quoted = text.partition('__version__ = "')[2].partition('"')[0]
    return tuple(int(part) for part in quoted.split(".") if part.isdigit())


def _check_version(path: Path) -> None:
    version = comfyui_version(path)
    if version and version < COMFYUI_FLOOR:
        found, floor = (".".join(map(str, v)) for v in (version, COMFYUI_FLOOR))
        raise SetupError(
            f"ComfyUI in {path} is version {found} and this pack needs {floor} or later: "
            "update it, or set COMFYUI_PATH to another ComfyUI."
        )


# --------------------------------------------------------------------------------- running things
def _run(command: Sequence[str], trouble: str, env: Mapping[str, str] | None = None) -> None:
    """Runs a command silently; if it fails, shows what git said or the end of the output."""
    done = subprocess.run(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env={**os.environ, **(env or {})},
    )
    if done.returncode:
        lines = done.stdout.splitlines()
        # comfy-cli buries git's one line under a traceback of its own.
        shown = [line for line in lines if line.startswith("fatal:")] or lines[-30:]
        print("\n".join(shown), file=sys.stderr, flush=True)
        raise SetupError(trouble)


def _pip(*what: str) -> None:
    flags = ("--quiet", "--disable-pip-version-check", "--no-input")
    _run(
        [str(venv_python()), "-m", "pip", "install", *flags, *what],
        f"pip could not install {' '.join(what)}: the lines above say why; put that right "
        "(network, disk space, Python version) and run the same command again.",
    )


def _create_venv() -> None:
    if venv_python().exists():
        return
    say(f"creating .venv with Python {sys.version.split()[0]}")
    # --clear also replaces an environment whose interpreter was uninstalled.
    _run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)],
        f"{sys.executable} could not create {VENV}: on Debian and Ubuntu install the package "
        "python3-venv, then run the same command again.",
    )


def _install_comfyui() -> Path:
    remedy = (
        f"install ComfyUI {COMFYUI_VERSION} or later yourself and set COMFYUI_PATH to its folder."
    )
    if shutil.which("git") is None:
        raise SetupError(f"no ComfyUI was found and there is no git to get it with: {remedy}")
    say(f"no ComfyUI found; installing version {COMFYUI_VERSION} into {HOME_INSTALL}")
    HOME_INSTALL.parent.mkdir(parents=True, exist_ok=True)
    # torch and the requirements are our own next steps, so that every ComfyUI gets the same pins.
    skips = ("--skip-manager", "--skip-torch-or-directml", "--skip-requirement", "--cpu")
    _run(
        [str(venv_python()), "-m", "comfy_cli", "--skip-prompt", "--workspace", str(HOME_INSTALL)]
        + ["install", "--version", COMFYUI_VERSION, *skips],
        f"comfy-cli could not install ComfyUI into {HOME_INSTALL}: {remedy}",
        # VIRTUAL_ENV keeps comfy-cli from making another environment inside ComfyUI.
        env={"VIRTUAL_ENV": str(VENV), "DO_NOT_TRACK": "1"},
    )
    if not _is_comfyui(HOME_INSTALL):
        raise SetupError(f"comfy-cli finished but left no ComfyUI in {HOME_INSTALL}: {remedy}")
    return HOME_INSTALL


def _install_programs() -> None:
    """Gets Chromium and redis-server for the tests where that can be done without asking."""
    missing = [name for name, known in PROGRAMS.items() if not any(map(shutil.which, known))]
    if not missing or not sys.platform.startswith("linux"):
        return
    names = " and ".join(missing)
    hint = f"WARNING: {names} not found, their tests cannot run; install {names}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        say(hint)
        return
    say(f"installing {names} with apt")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        _run(["apt-get", "update", "-qq"], hint, env=quiet)
        _run(["apt-get", "install", "-y", "-qq", *missing], hint, env=quiet)
    except SetupError as error:
        say(str(error))


# ------------------------------------------------------------------------------------ the stamps
def _stamp_file(tests: bool) -> Path:
    return VENV / ("qwen_vram_tests.stamp" if tests else "qwen_vram.stamp")


def _stamp(comfyui: Path, tests: bool) -> str:
    """A hash of everything whose change makes another installation necessary."""
    digest = hashlib.sha256(repr((str(comfyui), TORCH, tests)).encode())
    files = [VENV / "pyvenv.cfg", comfyui / "requirements.txt", ROOT / "requirements.txt"]
    if tests:
        files.append(ROOT / "requirements-test.txt")
    for file in files:
        digest.update(file.read_bytes() if file.is_file() else b"")
        digest.update(b"\0")
    return digest.hexdigest()


def _is_done(comfyui: Path, tests: bool) -> bool:
    file = _stamp_file(tests)
    return file.is_file() and file.read_text() == _stamp(comfyui, tests)


def _install_runtime(comfyui: Path) -> None:
    say(f"installing {TORCH[0]} (the longest step)")
    _pip(*TORCH)
    say(f"installing the requirements of {comfyui}")
    # The pins are repeated so that no requirement can move torch.
    _pip(*TORCH, "-r", str(comfyui / "requirements.txt"))
    if (ROOT / "requirements.txt").is_file():
        say("installing the requirements of the pack")
        _pip(*TORCH, "-r", str(ROOT / "requirements.txt"))


def ensure(tests: bool) -> Path:
    """Makes `.venv` and ComfyUI ready, quickly when they already are, and returns ComfyUI."""
    if sys.version_info < (3, 10):  # noqa: UP036 - this line is what an older Python gets to see
        raise SetupError(f"Python 3.10 or later is needed and this is {sys.version.split()[0]}.")
    comfyui = find_comfyui()
    if comfyui and venv_python().exists() and all(_is_done(comfyui, t) for t in {False, tests}):
        return comfyui
    if comfyui:
        _check_version(comfyui)
    _create_venv()
    say("installing comfy-cli")
    _pip("comfy-cli>=1.23")
    comfyui = comfyui or _install_comfyui()
    if not _is_done(comfyui, tests=False):
        _install_runtime(comfyui)
        _stamp_file(tests=False).write_text(_stamp(comfyui, tests=False))
    if tests:
        say("installing the test tools")
        _pip("-r", str(ROOT / "requirements-test.txt"))
        _install_programs()
        _stamp_file(tests=True).write_text(_stamp(comfyui, tests=True))
    return comfyui
