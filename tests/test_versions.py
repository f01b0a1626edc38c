"""machinery/versions.py: one warning for all versions that differ from requirements.txt, and none without need."""
from machinery import versions


def test_one_line_names_each_version_that_differs(tmp_path, monkeypatch, capsys):
    installed = {"torch": "2.13.0+cu130", "transformers": "5.0.0", "numpy": "1.0"}

    def version(name):
        if name not in installed:
            raise versions.PackageNotFoundError(name)
        return installed[name]
    (tmp_path / "requirements.txt").write_text("torch==2.13.0\ntransformers==5.23.0\npeft==0.21.2\nnumpy==2.4.6\n")
    monkeypatch.setattr(versions, "REQUIREMENTS", tmp_path / "requirements.txt")
    monkeypatch.setattr(versions, "version", version)
    versions.warn_of_other_versions()
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("warning: ")
    assert "transformers 5.0.0 (tested with 5.23.0)" in error and "peft missing (tested with 0.21.2)" in error
    assert "torch" not in error and "numpy" not in error       # a GPU build is the same version; numpy is not looked at
    installed.update({"transformers": "5.23.0", "peft": "0.21.2"})
    versions.warn_of_other_versions()
    assert capsys.readouterr() == ("", "")


def test_without_a_requirements_file_nothing_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(versions, "REQUIREMENTS", tmp_path / "none.txt")
    versions.warn_of_other_versions()
    assert capsys.readouterr() == ("", "")


def test_the_pins_are_found():
    text = versions.REQUIREMENTS.read_text()
    assert all(f"\n{name}==" in "\n" + text for name in versions.PINNED)
