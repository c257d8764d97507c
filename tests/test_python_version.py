"""An old Python is told so before anything else, in words and not by a syntax error."""

import ast
import sys
from collections import namedtuple

import pytest

Version = namedtuple("Version", "major minor micro releaselevel serial")


def test_an_old_python_is_told_so(root, monkeypatch):
    source = (root / "helpers/__init__.py").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "version_info", Version(3, 9, 1, "final", 0))
    with pytest.raises(ImportError, match=r"needs Python 3\.10 or newer, and this is Python 3\.9"):
        exec(compile(source, "helpers/__init__.py", "exec"), {})


def test_the_message_itself_parses_on_very_old_pythons(root):
    ast.parse((root / "helpers/__init__.py").read_text(encoding="utf-8"), feature_version=(3, 4))
