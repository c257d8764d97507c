"""Nothing in helpers or tools works on Linux only: found in the source, because CI here has one system.

`.github/workflows/tests.yml` runs the fast tests on the three systems.
"""

import ast
import re
from pathlib import Path

import pytest
import yaml

POSIX_MODULES = {"crypt", "fcntl", "grp", "nis", "posix", "pty", "pwd", "resource", "spwd", "syslog", "termios", "tty"}
OF_OS = "chown chroot fork forkpty getegid geteuid getgid getloadavg getpgid getuid kill killpg lchown link mkfifo mknod nice popen "
OF_OS += "posix_spawn sched_getaffinity sched_setaffinity setsid setuid statvfs symlink sync system uname wait waitpid"
OF_SIGNAL = "SIGALRM SIGCHLD SIGHUP SIGKILL SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 alarm pause setitimer"
POSIX_NAMES = {"os": set(OF_OS.split()), "signal": set(OF_SIGNAL.split()), "time": {"tzset"}}
POSIX_METHODS = {"symlink_to", "hardlink_to"}
POSIX_PATH = re.compile(r"/(bin|content|dev|etc|home|kaggle|mnt|opt|proc|root|run|sys|tmp|usr|var)(/|$)")
ONLY_IN_COLAB = {"/content/drive/MyDrive"}  # helpers/runtime.py: a folder that is not there anywhere else
POSIX_COMMANDS = set(
    [
        "bash",
        "sh",
        "rm",
        "cp",
        "mv",
        "cat",
        "ls",
        "which",
        "grep",
        "kill",
        "mkdir",
        "touch",
        "wget",
        "curl",
        "unzip",
        "tar",
        "df",
    ]
)
NO_TEXT = {"rb", "wb", "ab", "rb+", "r+b", "xb"}


def complaints(source: str) -> list[str]:
    tree = ast.parse(source)
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Try) and any("ImportError" in ast.dump(h) for h in node.handlers)
        for part in node.body
        for inner in ast.walk(part)
    }
    found = []
    for node in ast.walk(tree):
        for words in _about(node, guarded):
            found.append(f"line {node.lineno}: {words}")
    return found


def _about(node, guarded):
    if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in guarded:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        yield from (f"{name} is for POSIX only" for name in names if name.partition(".")[0] in POSIX_MODULES)
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.attr in POSIX_NAMES.get(node.value.id, ()):
            yield f"{node.value.id}.{node.attr} is for POSIX only"
        if node.attr in POSIX_METHODS:
            yield f".{node.attr} needs POSIX, or rights that Windows users lack"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if POSIX_PATH.match(node.value) and "\n" not in node.value and node.value not in ONLY_IN_COLAB:
            yield f"{node.value!r} is a path of one system"
        if re.search(r"%-[dHIjmMSUwWyY]", node.value):
            yield f"{node.value!r}: strftime knows %- on POSIX only"
    if isinstance(node, ast.Call):
        yield from _about_call(node)


def _about_call(call):
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "shell" in keywords:
        yield "shell= means another language on each system"
    if (
        name in ("run", "Popen", "check_call", "check_output")
        and call.args
        and isinstance(call.args[0], ast.List)
        and call.args[0].elts
    ):
        first = call.args[0].elts[0]
        if isinstance(first, ast.Constant) and first.value in POSIX_COMMANDS:
            yield f"{first.value} is not a command on every system"
    if name in ("read_text", "write_text") and "encoding" not in keywords:
        yield f"{name} without encoding= is not UTF-8 on Windows"
    if name == "open" and not (
        isinstance(call.func, ast.Attribute)
        and getattr(call.func.value, "id", "") in ("os", "webbrowser", "tarfile", "Image")
    ):
        modes = [argument.value for argument in [*call.args, *keywords.values()] if isinstance(argument, ast.Constant)]
        if (
            "encoding" not in keywords
            and not NO_TEXT & {mode for mode in modes if isinstance(mode, str)}
            and not _mode_is_computed(call)
        ):
            yield "open without encoding= is not UTF-8 on Windows"
    if name == "get_context" and call.args and getattr(call.args[0], "value", "") in ("fork", "forkserver"):
        yield "fork is for POSIX only"


def _mode_is_computed(call):
    """`open` where the mode, or whose `open` it is, cannot be read off the source: a method, an archive's member, a conditional mode."""
    return any(isinstance(argument, ast.IfExp) for argument in call.args) or (
        isinstance(call.func, ast.Attribute)
        and getattr(call.func.value, "id", "") in ("self", "archive", "gzip", "bz2", "lzma", "opener")
    )


def modules(root):
    return [path for folder in ("helpers", "tools") for path in sorted((root / folder).rglob("*.py"))]


def test_no_helper_and_no_tool_is_for_one_system_only(root):
    found = [
        f"{path.relative_to(root)}, {words}"
        for path in modules(root)
        for words in complaints(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "import fcntl",
        "from resource import getrusage",
        "import os\nos.fork()",
        "import signal\nsignal.signal(signal.SIGALRM, None)",
        "x = '/tmp/file'",
        "x = '/dev/null'",
        "import subprocess\nsubprocess.run('ls | wc', shell=True)",
        "import subprocess\nsubprocess.run(['rm', '-r', 'x'])",
        "open('x').read()",
        "from pathlib import Path\nPath('x').write_text('ü')",
        "import os\nos.system('clear')",
        "f'{now:%-d}'",
        "from pathlib import Path\nPath('x').symlink_to('y')",
        "import multiprocessing\nmultiprocessing.get_context('fork')",
    ],
)
def test_what_works_on_one_system_only_is_found(code):
    assert complaints(code)


@pytest.mark.parametrize(
    "code",
    [
        "try:\n    import resource\nexcept ImportError:\n    resource = None",
        "open('x', encoding='utf-8')",
        "open('x', 'rb')",
        "import sys, subprocess\nsubprocess.run([sys.executable, '-m', 'pip'])",
        "x = 'a/b'",
    ],
)
def test_what_works_everywhere_is_left_alone(code):
    assert complaints(code) == []


def test_file_names_in_the_repository_work_on_every_system(root):
    """No two names that differ in case only, none that Windows reserves, none too long for its older programs."""
    import subprocess

    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    files = names.stdout.splitlines()
    assert len({file.lower() for file in files}) == len(files)
    reserved = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?$", re.IGNORECASE)
    bad = [
        file
        for file in files
        if re.search(r'[<>:"|?*\\]|[ .]$', file) or any(reserved.match(part) for part in Path(file).parts)
    ]
    assert not bad and max(map(len, files)) < 120


def test_the_workflows_run_the_fast_tests_on_three_systems_with_actions_of_fixed_versions(root):
    workflows = {
        path.name: yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in (root / ".github" / "workflows").glob("*.yml")
    }
    jobs = [job for workflow in workflows.values() for job in workflow["jobs"].values()]
    systems = {system for job in jobs for system in job.get("strategy", {}).get("matrix", {}).get("os", [])}
    assert {system.partition("-")[0] for system in systems} == {"ubuntu", "windows", "macos"}
    steps = [step for job in jobs for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used and all(re.fullmatch(r"[\w.-]+/[\w.-]+@v\d+(\.\d+)*", action) for action in used), used
    said = "\n".join(step.get("run", "") for step in steps)
    assert 'pytest -m "not slow"' in said and "ruff check" in said
    assert all("timeout-minutes" in job for job in jobs) and all(
        workflow.get("permissions") == {"contents": "read"} for workflow in workflows.values()
    )
