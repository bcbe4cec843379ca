"""The CPU platform: refuses a release it does not know, and tells messages of two directions apart."""

import importlib.metadata
import subprocess

import pytest
import torch

from megatron_mm.platform import cpu
from tests.support.programs import INTERPRETER

pytestmark = pytest.mark.interface


def test_an_unknown_release_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "_device", None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.0")
    with pytest.raises(ValueError, match=r"megatron-core 0\.99\.0 was not tried; install one of: 0\.16\.1, 0\.19\.2"):
        cpu.apply()


def test_every_redirection_says_why():
    assert all(len(reason) >= len("the same") for reason in cpu.REDIRECTIONS.values())


@pytest.mark.slow
def test_what_is_listed_is_what_is_redirected():
    """Each name of the list exists in the installed torch and megatron-core, is redirected, and nothing else is."""
    script = """if True:
        import pkgutil
        from megatron_mm.platform import cpu

        listed, replaced, replace = set(), set(), cpu._replace
        for entry in cpu.REDIRECTIONS:
            owner = None
            for name in entry.split(", "):
                owner, name = name.rpartition(".")[::2] if "." in name else (owner, name)
                listed.add((pkgutil.resolve_name(owner), name))
        listed.remove((pkgutil.resolve_name("torch.compiler"), "set_stance"))  # is called, not replaced

        def noted(owner, **attributes):
            replaced.update((owner, name) for name in attributes)
            replace(owner, **attributes)
            assert all(getattr(owner, name) is value for name, value in attributes.items())

        cpu._replace = noted
        cpu.apply()
        assert listed == replaced, listed ^ replaced
    """
    done = subprocess.run([INTERPRETER, "-c", script], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_gone_is_refused():
    with pytest.raises(ValueError, match=r"redirects torch\.cuda\.no_such_name, which this release has not"):
        cpu._replace(torch.cuda, no_such_name=None)


def test_nothing_else_patches_torch_or_megatron():
    """Assignments to attributes of torch or megatron modules stand in platform/cpu.py only."""
    import ast
    from pathlib import Path

    def root(node):
        while isinstance(node, ast.Attribute):
            node = node.value
        return node.id if isinstance(node, ast.Name) else None

    package = Path(cpu.__file__).parents[1]
    for path in package.rglob("*.py"):
        if path == Path(cpu.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else []
            patched = [t for t in targets if isinstance(t, ast.Attribute) and root(t) in ("torch", "megatron")]
            assert not patched, f"{path}:{patched[0].lineno if patched else ''}"


@pytest.mark.slow
def test_factories_and_types_behave_as_megatron_expects():
    script = (
        "from megatron_mm.platform import setup, cpu\n"
        "device = setup.apply_platform()\n"
        "import torch\n"
        "assert torch.zeros(2, device='cuda').device == device == torch.cuda.current_device()\n"
        "assert torch.empty_like(torch.zeros(2), device=0).device.type == 'cpu'\n"
        "assert torch.zeros(2).type() == 'torch.cuda.FloatTensor' and torch.zeros(2).cuda().device.type == 'cpu'\n"
        "with torch.device('meta'):\n"  # of torch's own, first used after the platform
        "    assert torch.nn.Linear(2, 2).weight.is_meta and torch.arange(3).is_meta\n"
        "cpu.set_device('meta')\n"
        "assert torch.ones(3, device=torch.cuda.current_device()).is_meta\n"
    )
    done = subprocess.run([INTERPRETER, "-c", script], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
