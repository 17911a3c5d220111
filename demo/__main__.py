"""The commands: demo, setup, serve, quality, thumbnails, pictures, test, check and clean."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from .environment import ROOT, VENV, SetupError, ensure, inside_venv, say, venv_python

# Everything else of this package needs what set-up installs, so the commands import it themselves.
KNOWN = (
    "The model knows bear, bunny, cat, dog, fox, pig, mouse, panda, frog, duck, elephant and lion; "
    "red, orange, yellow, green, blue, purple, pink and brown; a hat, scarf, dress or glasses; "
    "standing, sitting, dancing, sleeping and reading; a plain background, meadow, snow, beach, "
    "night and room. English and Chinese."
)

PICTURES = ("examples", "nodes", "front", "help")
WORKERS = 3  # for the tests: two have ComfyUI in their process, or drive a server; one a browser


def _several(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2")
    return number


def _prompt(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError('it is empty; say what to draw, as "a red fox with a hat"')
    return text


def _picture(text: str) -> str:
    if text not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(PICTURES)}")
    return text


def _options(command: str, rest: Sequence[str]) -> argparse.Namespace:
    name = "python -m demo" + ("" if command == "demo" else f" {command}")
    parser = argparse.ArgumentParser(prog=name)
    if command == "demo":
        parser.description = (
            f"Draws and edits with the bundled workflow. Other commands: {', '.join(COMMANDS[1:])}."
        )
        parser.epilog = KNOWN
        parser.add_argument(
            "--prompt", type=_prompt, metavar="TEXT", help="what to draw instead of the examples"
        )
        parser.add_argument(
            "--keep-cache", action="store_true", help="start with the conditioning of earlier demos"
        )
    elif command == "quality":
        parser.description = "Measures the embedded model through ComfyUI's own sampling."
        wanted = "how many prompts, and edits; 2 or more (default %(default)s: some 19 minutes)"
        parser.add_argument("--count", type=_several, default=240, metavar="N", help=wanted)
        parser.add_argument("--sheets", type=Path, metavar="DIR", help="draw contact sheets there")
        parser.add_argument("--models", type=Path, metavar="DIR", help="another model's folder")
    elif command == "pictures":
        parser.description = (
            "Writes the examples into the help pages, and takes the pictures of the README in the "
            "real editor, after runs on the embedded model."
        )
        wanted = "examples, nodes, front or help (default: all, some 20 minutes)"
        parser.add_argument("what", nargs="*", metavar="WHAT", type=_picture, help=wanted)
        parser.add_argument("--only", nargs="+", default=[], metavar="NODE", help="of these nodes")
    elif command == "thumbnails":
        parser.description = "Runs the bundled workflows and draws their thumbnails of the results."
        parser.add_argument("name", nargs="*", help="workflows without .json (default: all)")
    elif command == "setup":
        parser.add_argument("--tests", action="store_true", help="also what the tests need")
    return parser.parse_args(rest)


def _reenter(arguments: Sequence[str]) -> int:
    """Runs the same command again on the interpreter of `.venv`."""
    command = [str(venv_python()), "-m", "demo", *arguments]
    if os.name == "nt":  # execv on Windows returns to the shell before the command has ended
        return subprocess.run(command, cwd=ROOT).returncode
    sys.stdout.flush()
    os.chdir(ROOT)
    os.execv(command[0], command)


def _call(*command: str) -> int:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode


def _demo(comfyui: Path, rest: Sequence[str]) -> int:
    from .checkpoints import CheckpointsError
    from .conversion import ConversionError
    from .server import ServerError
    from .showcase import DemoError, run
    from .substitutions import UnknownModelFile

    options = _options("demo", rest)
    known = (CheckpointsError, ConversionError, DemoError, ServerError, UnknownModelFile)
    try:
        run(comfyui, options.prompt, options.keep_cache)
    except known as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(comfyui: Path, rest: Sequence[str]) -> int:
    from .checkpoints import CheckpointsError
    from .server import ServerError
    from .serving import serve
    from .showcase import DemoError

    _options("serve", rest)
    try:
        serve(comfyui)
    except (CheckpointsError, DemoError, ServerError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _quality(comfyui: Path, rest: Sequence[str]) -> int:
    from .artist import Artist, import_comfyui
    from .embedded import FILES, FOLDER
    from .quality import measure
    from .showcase import has_accelerator

    options = _options("quality", rest)
    import_comfyui(comfyui, cpu=not has_accelerator())
    models = options.models or FOLDER
    missing = [name for name in FILES if not (models / name).is_file()]
    if missing:
        print(f"{models} lacks {', '.join(missing)}.", file=sys.stderr)
        return 1
    try:
        measure(Artist(models), models, options.count, options.sheets)
    except ValueError as error:  # CheckpointError is one
        print(error, file=sys.stderr)
        return 1
    return 0


def _pictures(comfyui: Path, rest: Sequence[str]) -> int:
    """Under pytest, because the pictures need the server and the browser of the tests."""
    options = _options("pictures", rest)
    os.environ["QWEN_VRAM_PICTURES"] = " ".join(options.only)
    chosen = " or ".join(f"make_{what}" for what in options.what or PICTURES)
    script = "tests/browser/make_pictures.py"
    return _call("pytest", script, "-o", "python_functions=make_", "-k", chosen)


def _thumbnails(comfyui: Path, rest: Sequence[str]) -> int:
    from .server import ServerError
    from .showcase import DemoError
    from .thumbnails import RECIPES, make

    names = _options("thumbnails", rest).name
    if unknown := [name for name in names if name not in RECIPES]:
        print(f"No workflow {unknown[0]}; there are: {', '.join(RECIPES)}.", file=sys.stderr)
        return 2
    try:
        make(comfyui, names)
    except (DemoError, ServerError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _keep_bytecode() -> None:
    """Let ComfyUI's 700 modules be compiled once, not by each process that the tests start.

    Where bytecode is switched off it goes to a folder of its own, not beside the sources.
    """
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", "") and "PYTHONPYCACHEPREFIX" not in os.environ:
        folder = VENV / "bytecode"
        os.environ["PYTHONPYCACHEPREFIX"] = str(folder)
        if not folder.is_dir():
            for kind in ("stdlib", "purelib"):
                link_bytecode(Path(sysconfig.get_path(kind)), folder)


def link_bytecode(modules: Path, folder: Path) -> None:
    """Put there what is compiled already: Python then does not look beside the modules.

    What cannot be linked, as on another disk, is compiled once more.
    """
    for compiled in modules.rglob("__pycache__/*.pyc"):
        source = compiled.parent.parent
        target = folder / source.relative_to(source.anchor) / compiled.name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(compiled, target)
        except FileExistsError:
            continue
        except OSError:
            return


def _test(comfyui: Path, rest: Sequence[str]) -> int:
    """All tests in several processes, or in this one those that are named."""
    _keep_bytecode()
    if any(argument.startswith("tests") for argument in rest):
        return _call("pytest", *rest)
    # Each with its share of the cores: more threads of torch than cores only disturb each other.
    share = max(1, (os.cpu_count() or 1) // WORKERS)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    return _call("pytest", "-n", str(WORKERS), "tests", *rest)


def _check(comfyui: Path, rest: Sequence[str]) -> int:
    _options("check", rest)
    steps = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("pytest", "tests/static"))
    codes = [_call(*step) for step in steps]  # all of them, so that one run shows everything
    return int(any(codes))


def _clean() -> None:
    """Removes what set-up, the demo and the tools made inside the repository."""
    names = (".demo", ".pytest_cache", ".hypothesis", ".ruff_cache")
    for folder in [VENV, *(ROOT / name for name in names)]:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in list(ROOT.glob("**/__pycache__")):
        shutil.rmtree(folder, ignore_errors=True)


IN_VENV: dict[str, Callable[[Path, Sequence[str]], int]] = {
    "demo": _demo,
    "serve": _serve,
    "quality": _quality,
    "pictures": _pictures,
    "thumbnails": _thumbnails,
    "test": _test,
    "check": _check,
}
COMMANDS = (*IN_VENV, "setup", "clean")


def main(arguments: Sequence[str]) -> int:
    """Sets up what the command needs, moves into `.venv` and runs the command there."""
    named = bool(arguments) and arguments[0] in COMMANDS
    if arguments and not named and not arguments[0].startswith("-"):
        print(f"No command {arguments[0]}; there are: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    command = arguments[0] if named else "demo"
    rest = list(arguments[1:] if named else arguments)
    # Options are read before set-up too, so that a typing error does not cost minutes.
    options = argparse.Namespace() if command == "test" else _options(command, rest)
    if hasattr(sys.stdout, "reconfigure"):  # a Windows pipe may know no Chinese
        sys.stdout.reconfigure(errors="replace")
    # A terminated demo ends like an interrupted one, and so stops its server.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        if command == "clean":
            _clean()
            return 0
        tests = command in ("pictures", "test", "check") or getattr(options, "tests", False)
        comfyui = ensure(tests)
        if command == "setup":
            say(f"ready, with ComfyUI in {comfyui}")
            return 0
        if not inside_venv():
            return _reenter([command, *rest])
        os.environ["COMFYUI_PATH"] = str(comfyui)
        return IN_VENV[command](comfyui, rest)
    except SetupError as error:
        print(f"Set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
