"""`tpu/compile.py`: train steps by a TPU's own compiler, and the same programs run on the CPU.

Needs jax and libtpu (`pip install ".[tpu-check]"`), which the other tests do without.
"""

import atexit
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest
from selection import some
from tpu_folder import TPU

import compiler  # isort: skip
import costs  # isort: skip
import methods  # isort: skip

HERE = pathlib.Path(__file__).parent
missing = [name for name in ("jax", "libtpu") if importlib.util.find_spec(name) is None]
needs_compiler = pytest.mark.skipif(bool(missing), reason=f'no {" and no ".join(missing)}: pip install ".[tpu-check]"')
POLICIES = ["float32", "mixed_bfloat16"]
FEW = [(name, "float32") for name in ("sgd", "neumann", "kfac")]
NAMES = list(methods.OPTIMIZERS)
FAMILIES = ["sgd", "neumann", "shampoo", "curveball", "hessian_free", "adahessian", "kfac"]


def environment():
    """The variables of a program of its own."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}


def program(*arguments, timeout=3000):
    """The output of a program of its own."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)


@functools.cache
def answering():
    """A process of `compiled_steps.py` that answers all tests of this one."""
    command = [sys.executable, str(HERE / "compiled_steps.py")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment(), stdin=pipe, stdout=pipe, text=True)
    atexit.register(process.kill)
    return process


@functools.cache
def step(how, where, policy, name):
    """A record of `compiled_steps.py`."""
    process = answering()
    process.stdin.write(f"{how} {where} {policy} {name}\n")
    process.stdin.flush()
    record = json.loads(process.stdout.readline() or '{"error": "the process has ended"}')
    assert "error" not in record, record["error"]
    return record


def assert_belongs_on_a_tpu(found, name):
    """No call of the host, no shape that depends on values; float64, which it emulates, for small matrices at most."""
    assert found["foreign"]["host"] == found["foreign"]["dynamic"] == []
    assert name in methods.IN_DOUBLE or found["foreign"]["float64"] == []


@needs_compiler
@pytest.mark.parametrize(("name", "policy"), some(list(itertools.product(NAMES, POLICIES)), FEW))
def test_a_step_compiles_for_a_chip(name, policy):
    found = step("compile", "v5e:1x1", policy, name)
    assert_belongs_on_a_tpu(found, name)
    assert found["collectives"] == []
    weights = found["model"]["weights"]
    assert 4 * weights < found["memory"] < 2**24 and found["flops"] > 2 * weights


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_four_chips_reduces_as_the_formula_says(name, policy):
    found = step("compile", "v5e:2x2", policy, name)
    assert_belongs_on_a_tpu(found, name)
    formula, model = methods.formulas()[name], found["model"]
    given = {key: tuple(map(tuple, model[key])) for key in ("shapes", "blocks")}
    given |= {key: tuple(model[key]) for key in ("positions", "outside", "hidden", "ends")}
    given |= {"outputs": model["outputs"], "apart": False}  # it has batch statistics
    of = costs.Model("", 8, model["weights"], model["tensors"], (), **given)
    calls = sum(work.collectives(of, 4)[0] for work in formula.sections.values())
    numbers = formula.numbers(of, 4)
    reduces = [size for kind, size in found["collectives"] if kind == "all-reduce"]
    assert len(reduces) == len(found["collectives"])
    # the compiler joins what does not wait for another; a loop may be unrolled, and what nobody reads is dropped
    assert 1 <= len(reduces) <= calls
    assert sum(reduces) <= 4 * numbers


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_compiles_for_a_slice_of_256_chips(name):
    assert_belongs_on_a_tpu(step("compile", "v5e:16x16", "float32", name), name)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_program_moves_the_weights_as_tensorflow_does(name, replicas):
    found = step("run", replicas, "float32", name)
    assert found["replicas"] is True
    assert found["moved"] > 1e-4
    # iterations of conjugate gradients amplify rounding, on one replica of TensorFlow's as well
    assert found["weights"] < (5e-5 if name == "hessian_free" else 2e-6 * max(1.0, found["moved"]))


@needs_compiler
@pytest.mark.slow
def test_exported_programs_give_the_weights_of_tensorflow(tmp_path):
    """Written with TensorFlow, run by a program that imports JAX and NumPy alone."""
    done = program(TPU / "exported.py", tmp_path, "--optimizers", "sgd,neumann", "--examples", "4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tensorflow" not in (TPU / "run_exported.py").read_text().replace("TensorFlow", "")
    done = program(TPU / "run_exported.py", tmp_path, "--seconds", "0.1")
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["cnn-sgd-float32", "cnn-neumann-float32"]
    assert all(float(row[4]) < 1e-6 < float(row[5]) for row in rows)
    assert all(0.0 < float(row[6]) < 1e-4 for row in rows)


# What a compiler is not needed for.


def test_collectives_are_read_off_a_program():
    hlo = """
      %all-reduce.8 = (f32[3,3,1,16]{3,2,1,0:T(1,128)S(1)}, bf16[16]{0}, f32[]{:T(128)}) all-reduce(%a, %b, %c)
      %all-reduce-start.1 = f32[8,2]{1,0} all-reduce-start(%d), replica_groups={{0,1}}
      %all-reduce-done.1 = f32[8,2]{1,0} all-reduce-done(%all-reduce-start.1)
      %get-tuple-element.27 = f32[3,3,1,16]{3,2,1,0} get-tuple-element(%all-reduce.8), index=0
      %all-gather.2 = s64[4]{0} all-gather(%e), dimensions={0}
    """
    expected = [("all-reduce", 4 * 144 + 2 * 16 + 4), ("all-reduce", 64), ("all-gather", 32)]
    assert compiler.collectives_in(hlo) == expected


def test_what_is_foreign_is_read_off_a_program():
    text = """
      %1 = stablehlo.add %a, %b : tensor<2x2xf64>
      %2 = stablehlo.add %a, %b : tensor<40xf64>
      %3 = stablehlo.custom_call @xla_python_cpu_callback(%a) : (tensor<f64>) -> tensor<f32>
      %4 = stablehlo.custom_call @LuDecomposition(%a) : (tensor<4x4xf32>) -> tensor<4x4xf32>
      %5 = stablehlo.real_dynamic_slice %a : tensor<?x3xf32>
      %6 = "stablehlo.infeed"(%t) : (!stablehlo.token) -> tensor<f32>
    """
    found = compiler.foreign(text)
    assert found["float64"] == ["40xf64"]
    assert found["host"] == ["infeed", "xla_python_cpu_callback"]
    assert found["dynamic"] == ["tensor<?x3xf32>"]


def test_a_step_meets_the_tightest_bound():
    machine = compiler.MACHINES[2]
    found = compiler.Compiled(0, 0, 0, 0, 197e12, 819e9 / 2, [("all-reduce", int(1e9)), ("all-gather", 5)], 0.0)
    times = found.times(machine, 4)
    assert machine.name == "TPU v5e"
    assert times == {"arithmetic": 1.0, "memory": 0.5, "network": pytest.approx(1.5 * 1e9 / 100e9)}
    assert found.times(machine, 1)["network"] == 0.0


@pytest.mark.parametrize(
    ("message", "kind", "expected"),
    [
        ("ABORTED: Internal error when accessing libtpu multi-process lockfile.", ConnectionError, "Another process"),
        ("Could not open libtpu.so", ConnectionError, r'does not load: `pip install "\.\[tpu-check\]"`'),
        ("Invalid chip config 3x7", ValueError, "`--topology` v5e:3x7 is none that the compiler knows: Invalid chip"),
    ],
)
def test_a_compiler_that_does_not_load_is_said(message, kind, expected):
    error = compiler.said(RuntimeError(message), "v5e:3x7")
    assert isinstance(error, kind)
    with pytest.raises(kind, match=expected):
        raise error


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:2", "v5e:axb", ""])
def test_an_unknown_topology_is_refused(name):
    with pytest.raises(ValueError, match=r"`--topology` must be a kind and its chips, such as v4:2x2x1.*Received: "):
        compiler.topology(name)


def test_a_program_that_does_not_fit_is_said_in_bytes():
    new = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    new += "temporaries (30.52G) exceeds available HBM (15.75G). HLO module: m."
    old = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 30.52G of 15.75G hbm. Exceeded by 14.77G."
    for text in (new, old):
        found = compiler.out_of_memory(text)
        assert (found.needed, found.there) == (30.52 * 2**30, 15.75 * 2**30)
        assert str(found) == "needs 32.77 GB of the chip's 16.91 GB"
    assert compiler.out_of_memory("INVALID_ARGUMENT: no such operation") is None


@needs_compiler
@pytest.mark.slow
def test_the_compiler_refuses_what_is_too_large():
    matrix = "tensor<64000x64000xf32>"
    text = f"""module @m {{ func.func @main(%a: {matrix}) -> {matrix} {{
      %0 = stablehlo.dot_general %a, %a, contracting_dims = [1] x [0] : ({matrix}, {matrix}) -> {matrix}
      return %0 : {matrix} }} }}"""
    code = "import sys, tpu_folder, compiler; compiler.compiled(sys.argv[1], compiler.topology('v5e:1x1').devices)"
    assert "compiler.DoesNotFit: needs 32.77 GB of the chip's 16.91 GB" in program("-c", code, text).stderr


@needs_compiler
@pytest.mark.slow
def test_the_program_prints_a_table():
    done = program(TPU / "compile.py", "--topology", "v5e:1x1", "--optimizer", "neumann", "--per_replica_batch", "4")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "cnn, float32, 4 examples on each of 1 chips (TPU v5e, 16 GiB)"
    assert [line.split()[0] for line in lines[2:]] == ["sgd", "neumann"] and lines[3].endswith("nothing")


def test_the_largest_batch_that_fits_is_said(monkeypatch, capsys):
    """Among the halves of what was asked for. The compiler is a double with memory for 10 examples of SGD alone."""
    module = compile_program()
    chip = types.SimpleNamespace(machine=compiler.MACHINES[2], devices=(None,))
    monkeypatch.setattr(module, "topology", lambda name: chip)

    def measured(name, args, chips):
        if args.per_replica_batch > (10 if name == "sgd" else 0):
            raise compiler.DoesNotFit(args.per_replica_batch * 1e9, 10e9)

    monkeypatch.setattr(module, "measured", measured)
    module.main(["--per_replica_batch", "64", "--optimizer", "kfac"])
    said = capsys.readouterr().out.splitlines()
    assert said[2].endswith("does not fit: needs 64.00 GB of the chip's 10.00 GB; `--per_replica_batch 8` fits")
    assert said[3].startswith("kfac ") and said[3].endswith("; no batch does")


def test_an_optimizer_that_refuses_the_model_gets_a_line(monkeypatch, capsys):
    module = compile_program()
    monkeypatch.setattr(module, "topology", lambda name: types.SimpleNamespace(
        machine=compiler.MACHINES[2], devices=(None,)))  # fmt: skip

    def measured(name, args, chips):
        raise ValueError("`BFGS` keeps a dense matrix")

    monkeypatch.setattr(module, "measured", measured)
    module.main(["--optimizer", "bfgs"])
    said = capsys.readouterr().out.splitlines()
    assert said[3].startswith("bfgs ") and said[3].endswith("is refused: `BFGS` keeps a dense matrix")


def compile_program():
    """The module of `tpu/compile.py`, whose name is also that of a function of Python's."""
    spec = importlib.util.spec_from_file_location("compile_program", TPU / "compile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--optimizer", "sophia"], "`--optimizer` must be one of sgd, adam"),
        (["--model", "vgg"], "`--model` must be one of cnn, resnet50, transformer, "),
        (["--model", "vgg"], "cnn_32, autoencoder. Received: 'vgg'"),
        (["--per_replica_batch", "0"], "`--per_replica_batch` must be at least 1. Received: 0"),
        (["--topology", "v5x:2x2"], "`--topology` must be a kind and its chips"),
    ],
)
def test_the_program_refuses(given, message, capsys):
    with pytest.raises(SystemExit) as stop:
        compile_program().main(given)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
