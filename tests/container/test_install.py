import importlib.util
import sys
import zipfile

import pytest

from tests.container.images import ROOT

specification = importlib.util.spec_from_file_location("install", ROOT / "docker" / "install.py")
install = importlib.util.module_from_spec(specification)
specification.loader.exec_module(install)


def put(site, name, version):
    """A package in the folder `site`, in place of one of that name."""
    for old in site.glob(f"{name.replace('-', '_')}-*.dist-info"):
        (old / "METADATA").unlink()
        old.rmdir()
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (site / name).mkdir(exist_ok=True)
    (site / name / "__init__.py").write_text(f"__version__ = '{version}'\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The packages of a base image: an NGC torch, numpy, and one of the distribution's."""
    put(tmp_path / "site", "torch", "2.9.0a0+50eac811a6.nv25.9")
    put(tmp_path / "site", "numpy", "1.26.4")
    put(tmp_path / "site", "python-apt", "2.7.7ubuntu4-debian")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    return tmp_path / "site"


@pytest.fixture
def wheel(tmp_path):
    (tmp_path / "future-0.18.3-py3-none-any.whl").touch()
    path = tmp_path / "megatron_s3-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "megatron_s3-0.1.0.dist-info/METADATA",
            "Metadata-Version: 2.4\nName: megatron-s3\nVersion: 0.1.0\n"
            "Requires-Dist: torch>=2.6\nRequires-Dist: ruff==0.17.6; extra == 'test'\n"
            + "".join(
                f'Requires-Dist: {pin}; extra == "quickstart"\n'
                for pin in ("torch==2.13.0", "megatron-core==0.19.2", "numpy==2.5.5", "Psutil==7.2")
            )
            + 'Requires-Dist: lm-eval[hf]>=0.4.13; extra == "eval"\n'
            "Requires-Dist: lm-eval[hf]==0.4.14; extra == 'test'\n",
        )
    return path


def attempt(monkeypatch, wheel, pip, version="unknown"):
    """Installs with `pip(constraints)` in place of pip."""

    def run(command, **environment):
        assert environment == {"PIP_CONSTRAINT": ""}
        constraint = command.index("--constraint") + 1
        with open(command[constraint]) as file:
            pip(file.read().split(), command[constraint + 1 :])

    monkeypatch.setattr(install, "_run", run)
    install._install(wheel, install.tested_with(wheel), "0.18.2", version)


def test_constrains_pip_to_the_base_and_to_tested_versions(site, wheel, monkeypatch, capsys):
    seen = []
    attempt(monkeypatch, wheel, lambda *asked: (seen.extend(asked), put(site, "psutil", "7.2")))
    assert seen[0] == [
        "lm-eval==0.4.14",
        "megatron-core==0.18.2",
        "numpy==1.26.4",
        "psutil==7.2",
        "ruff==0.17.6",
        "torch==2.9.0a0+50eac811a6.nv25.9",
    ]
    # With what its verbs import, and what PyPI has no wheel of.
    beside = str(wheel.parent / "future-0.18.3-py3-none-any.whl")
    wanted = ["torch", "megatron-core", "numpy", "psutil"]
    assert seen[1] == [f"{wheel}[data,eval]", beside, *wanted]
    said = capsys.readouterr().out
    assert "torch 2.9.0a0+50eac811a6.nv25.9 and 3 packages of the base are as they were" in said
    assert "added psutil==7.2" in said


def test_refuses_an_image_whose_numpy_pip_has_changed(site, wheel, monkeypatch):
    with pytest.raises(RuntimeError, match=r"changed: {'numpy': '1.26.4 -> 2.5.5'}"):
        attempt(monkeypatch, wheel, lambda *_: put(site, "numpy", "2.5.5"))


def test_refuses_an_image_whose_torch_has_other_files(site, wheel, monkeypatch):
    with pytest.raises(RuntimeError, match="changed: files of torch"):
        attempt(monkeypatch, wheel, lambda *_: (site / "torch" / "more.so").write_text(""))


def test_refuses_a_base_without_torch(site, wheel, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(RuntimeError, match="no torch: BASE_IMAGE has to be"):
        attempt(monkeypatch, wheel, lambda *_: None)


def test_refuses_a_label_of_another_version(site, wheel, monkeypatch):
    with pytest.raises(RuntimeError, match=r"VERSION=0.2.0: the plugin's version is 0.1.0"):
        attempt(monkeypatch, wheel, lambda *_: None, version="0.2.0")
