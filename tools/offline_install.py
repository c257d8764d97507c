"""Install the course from this folder, without network: python install.py

It makes .venv here, installs the wheels from wheels/, unpacks the model, and says how to open the notebooks. Running it again
mends what is missing. It needs nothing but Python's standard library.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
WINDOWS = sys.platform == "win32"
PYTHON = FOLDER / ".venv" / ("Scripts/python.exe" if WINDOWS else "bin/python")


def refuse(message):
    sys.exit("Not installed: " + message)


def check(made_for):
    """Wheels are made for one system and one version of Python."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if made_for["system"] != platform.system():
        refuse(f"this bundle is for {made_for['system']}, and this is {platform.system()}. Ask for the other one.")
    if made_for["python"] != here:
        command = f"{'py -' if WINDOWS else 'python'}{made_for['python']} install.py"
        refuse(f"this bundle is for Python {made_for['python']}, and this is Python {here}. Run: {command}")


def make_environment():
    if PYTHON.is_file():
        return
    try:
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER / ".venv")], check=True)
    except subprocess.CalledProcessError:
        refuse(
            "Python could not make .venv here. On Debian and Ubuntu the package python3-venv is missing; else the disk may be full."
        )


def install(packages):
    """From wheels/ alone, whatever this machine's pip is otherwise told."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    clean["PIP_CONFIG_FILE"] = os.devnull
    command = [
        str(PYTHON),
        "-m",
        "pip",
        "install",
        "--no-index",
        "--find-links",
        "wheels",
        "--no-compile",
        "--quiet",
        "--disable-pip-version-check",
        "-r",
        "requirements.txt",
        *packages,
        "-c",
        "constraints.txt",
    ]
    if subprocess.run(command, cwd=str(FOLDER), env=clean).returncode:
        refuse("pip says above what it misses. If wheels are missing, the bundle was not copied whole: copy it again.")


def unpack_model():
    """Where the notebooks look for it: the cache folder in the home folder, or HF_HOME."""
    code = "from helpers.weights import bundled_model; print('model in', bundled_model())"
    offline = dict(os.environ, HF_HUB_OFFLINE="1")
    if subprocess.run([str(PYTHON), "-c", code], cwd=str(FOLDER), env=offline).returncode:
        refuse("the model could not be unpacked; the lines above say why.")


def main():
    made_for = json.loads((FOLDER / "bundle.json").read_text(encoding="utf-8"))
    check(made_for)
    print("Installing into .venv, which takes a few minutes ...", flush=True)
    make_environment()
    install(made_for["packages"])
    unpack_model()
    jupyter = ".venv\\Scripts\\jupyter.exe" if WINDOWS else ".venv/bin/jupyter"
    print(f"Done. Open the notebooks, in this folder, with:\n    {jupyter} lab notebooks/00_quickstart.ipynb")


if __name__ == "__main__":
    main()
