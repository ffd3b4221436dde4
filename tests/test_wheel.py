"""The wheel has the package, and nothing else."""

import email
import pathlib
import subprocess
import sys
import zipfile

import pytest

import keras_curvature

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_is_the_package(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        metadata = email.message_from_bytes(wheel.read(next(name for name in names if name.endswith("METADATA"))))
    ours = {str(file.relative_to(ROOT)) for file in (ROOT / "keras_curvature").rglob("*.py")}
    data = {"keras_curvature/py.typed", "keras_curvature/problems/nist.npz"}
    assert {name for name in names if ".dist-info/" not in name} == ours | data
    assert metadata["Version"] == keras_curvature.__version__ and metadata["Requires-Python"] == ">=3.11"
    assert metadata["Summary"] and metadata.get_payload().startswith("# keras_curvature")
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [line.partition("<")[0] for line in required] == ["keras", "numpy"]
