"""The command line: its names and defaults, what goes to stdout, and how every kind of failure ends."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lowbit
from lowbit.cli import main

ROOT = Path(__file__).parent.parent
DATA = ROOT / "eval" / "data"
MODEL, TEXT = str(DATA / "books-4m"), str(DATA / "books-test.txt")
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def run(*arguments, **options):
    """The command as a process of its own."""
    command = [sys.executable, "-m", "lowbit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300, **options)


@pytest.fixture
def public(monkeypatch):
    """Replaces a public function of the package for one test."""
    return lambda name, function: monkeypatch.setitem(vars(lowbit), name, function)


def raising(error):
    def function(*args, **options):
        raise error

    return function


def only_error(capsys):
    """The one message on stderr, with nothing on stdout and no traceback."""
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.startswith("lowbit: error: ") and err.count("lowbit:") == 1
    return err.removeprefix("lowbit: error: ").rstrip("\n")


# --- the interface, as the issue writes it


def test_quantize_passes_the_documented_defaults(public, capsys):
    calls = []

    def quantize(*args, **options):
        calls.append((args, options))
        print("the summary")
        return SimpleNamespace(to_dict=lambda: {"method": options["method"]})

    public("quantize", quantize)
    assert main(["quantize", "model", "out"]) == 0
    assert calls == [
        (
            ("model", "out", 4),
            {
                "group_size": None, "symmetric": None, "activations": None, "smooth": None, "method": "gptq",
                "calibration": None, "samples": None, "seq_len": 2048, "ignore": (), "device": "auto", "dtype": "auto",
                "seed": 0, "overwrite": False, "allow_partial": False, "trust_remote_code": False,
            },
        )
    ]  # fmt: skip
    assert capsys.readouterr().out == "the summary\n"


def test_quantize_passes_every_option(public):
    options = {}
    public("quantize", lambda model, out, bits, **given: options.update(bits=bits, **given) or _report())
    line = "--bits 8 --group-size -1 --asymmetric --method awq+gptq --calibration a.txt --samples 3 --seq-len 64"
    line += " --seed 7"
    line += " --ignore lm_head --ignore .*down_proj --device cpu --dtype float32 --overwrite --allow-partial"
    line += " --trust-remote-code"
    assert main(["quantize", "model", "out", *line.split()]) == 0
    assert options == {
        "bits": 8, "group_size": -1, "symmetric": False, "activations": None, "smooth": None, "method": "awq+gptq",
        "calibration": "a.txt", "samples": 3, "seq_len": 64, "ignore": ("lm_head", ".*down_proj"),
        "device": "cpu", "dtype": "float32", "seed": 7,
        "overwrite": True, "allow_partial": True, "trust_remote_code": True,
    }  # fmt: skip


def test_quantize_passes_activations_and_smoothing(public):
    options = {}
    public("quantize", lambda model, out, bits, **given: options.update(bits=bits, **given) or _report())
    assert main(["quantize", "model", "out", *["--bits", "8", "--activations", "int8-static", "--smooth", "0.5"]]) == 0
    given = {name: options[name] for name in ("bits", "group_size", "symmetric", "activations", "smooth")}
    assert given == {"bits": 8, "group_size": None, "symmetric": None, "activations": "int8-static", "smooth": 0.5}


def _report():
    return SimpleNamespace(to_dict=lambda: {"coverage": 1.0})


@pytest.mark.parametrize(("flag", "value"), [("--symmetric", True), ("--asymmetric", False)])
def test_the_grid_is_chosen_by_two_flags(public, flag, value):
    seen = []
    public("quantize", lambda *_, symmetric, **__: seen.append(symmetric) or _report())
    assert main(["quantize", "m", "o", flag]) == 0
    assert seen == [value]


def test_json_of_quantize_is_the_only_thing_on_stdout(public, capsys):
    def quantize(*args, **options):
        print("progress that a library prints on stdout")
        return _report()

    public("quantize", quantize)
    assert main(["quantize", "m", "o", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"coverage": 1.0} and out.count("\n") == 1
    assert "progress that a library prints" in err


def test_eval_json_has_the_documented_fields():
    """A dense model, by itself and as its own base: the real command in a real process."""
    done = run("eval", MODEL, "--data", TEXT, "--base", MODEL, "--seq-len", "64", "--max-windows", "2", "--json")
    assert done.returncode == 0, done.stderr
    fields = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert {"ppl", "tokens", "windows", "seq_len", "base_ppl", "kl", "top1"} <= set(fields)
    assert (fields["windows"], fields["seq_len"], fields["tokens"]) == (2, 64, 126)
    assert (fields["kl"], fields["top1"]) == (0.0, 1.0) and fields["ppl"] == fields["base_ppl"]
    assert "evaluating" in done.stderr, "progress goes to stderr"


def test_eval_prints_figures_and_their_definition(capsys):
    assert main(["eval", MODEL, "--data", TEXT, "--seq-len", "64", "--max-windows", "2", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("perplexity") and "ppl = exp(" in out


def test_the_perplexity_script_is_the_eval_command():
    line = [sys.executable, str(ROOT / "eval" / "perplexity.py"), MODEL, TEXT, "--max-windows", "1", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["windows"] == 1


def test_inspect_prints_text_or_json(public, capsys):
    class Inspection:
        def to_dict(self):
            return {"bits": 4}

        def __str__(self):
            return "a table"

    public("inspect", lambda path: Inspection())
    assert main(["inspect", "m"]) == 0
    assert capsys.readouterr().out == "a table\n"
    assert main(["inspect", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"bits": 4}


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lowbit {lowbit.__version__}\n"


def test_help_imports_nothing_heavy():
    code = "import sys; from lowbit.cli import main; main(['quantize', '--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, timeout=60, check=True)
    assert "--group-size" in done.stdout
    assert not {"torch", "transformers", "datasets", "triton"} & set(done.stderr.split())


def test_a_commands_imports_are_not_collected_and_what_comes_after_is():
    code = (
        "import gc; from lowbit.cli import main; status = main(['quantize', 'absent', 'out']);"
        "frozen = gc.get_freeze_count(); main(['eval', 'absent']);"  # some of the frozen objects may go, none are added
        "print(status, gc.isenabled(), frozen > 100_000, gc.get_freeze_count() <= frozen)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENV, timeout=120, check=True
    )
    assert done.stdout.split() == ["2", "True", "True", "True"], done.stderr


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("raised, status", [("None", 0), ("ValueError('no')", 2), ("ZeroDivisionError('no')", 1)])
def test_a_process_of_the_commands_own_frees_nothing_and_skips_nothing_else(own, raised, status):
    """Handlers of others run, what is buffered is written, the status is the command's; objects are not freed."""
    code = f"""
        import atexit, os, sys, threading, time
        import lowbit.cli
        class Freed:
            def __del__(self, write=os.write): write(1, b"freed")
        kept = Freed()
        def work(*_, **__):
            atexit.register(print, "handler", end=" ")
            threading.Thread(target=lambda: (time.sleep(0.2), print("thread", end=" "))).start()
            if {raised}: raise {raised}
            return type("Report", (), dict(to_dict=dict, __str__=lambda self: "done"))()
        lowbit.inspect = work
        sys.argv = ["lowbit", "inspect", "m"]
        sys.exit(lowbit.cli.main({"" if own else "sys.argv[1:]"}))
    """
    line = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(line, capture_output=True, text=True, env=ENV, timeout=120)
    said = ["done"] * (status == 0) + ["thread", "handler"] + ["freed"] * (not own)
    assert (done.returncode, done.stdout.split()) == (status, said), done.stderr
    assert ("Traceback" in done.stderr) == (status == 1)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings are Linux's")
@pytest.mark.parametrize("given", [None, "glibc.malloc.arena_max=2"])
@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_quantize_runs_without_glibcs_cache_unless_the_user_has_settings(command, given):
    """The process is started anew before anything is imported: same number, same exit status, one message."""
    code = "import os; from lowbit.cli import main; print(os.getpid(), main(), os.environ.get('GLIBC_TUNABLES'))"
    env = {name: value for name, value in ENV.items() if name != "GLIBC_TUNABLES"}
    env |= {} if given is None else {"GLIBC_TUNABLES": given}
    arguments = [sys.executable, "-c", code, command, "absent", *(["out"] if command == "quantize" else [])]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    out, err = process.communicate(timeout=120)
    expected = "glibc.malloc.tcache_count=0" if command == "quantize" and given is None else given
    assert out.split() == [str(process.pid), "2", str(expected)], err
    assert err.count("absent") >= 1 and err.count("lowbit: error:") == 1


# --- failures


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "m"],
        ["quantize", "m", "o", "--no-such-option"],
        ["quantize", "m", "o", "--method", "magic"],
        ["quantize", "m", "o", "--bits", "four"],
        ["no-such-command"],
        [],
    ],
)
def test_usage_errors_end_with_status_2_and_an_empty_stdout_but_for_help(public, capsys, arguments):
    public("quantize", raising(AssertionError("must not be called")))
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--bits 7", r"bits must be one of (2, 3, 4, 5, 6, 8), got 7"),
        ("--group-size 48", "group_size must be one of"),
        ("--activations int8", "8 bits in whole rows (bits 8, group_size -1), symmetric; got bits 4"),
        ("--activations int8 --bits 8 --group-size 128", "got bits 8, group_size 128, symmetric"),
        ("--activations int8 --bits 8 --asymmetric", "got bits 8, group_size -1, asymmetric"),
        ("--activations int8 --bits 8 --method awq", "the method must be one of ('gptq', 'rtn'), got 'awq'"),
        ("--activations int8 --bits 8 --smooth 1.5", "smooth must lie between 0 and 1"),
        ("--bits 8 --smooth 0.5", "it goes with activations int8 or int8-static"),
    ],
)
def test_an_impossible_spec_is_refused_before_anything_is_loaded(public, capsys, options, complaint):
    public("quantize", raising(AssertionError("must not be called")))
    assert main(["quantize", "m", "o", *options.split()]) == 2
    assert complaint in only_error(capsys)


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("layer 3: group_size 128 does not divide 96"), "layer 3: group_size 128 does not divide 96"),
        (FileExistsError("out exists; --overwrite replaces it"), "out exists; --overwrite replaces it"),
        (OSError(28, "No space left on device", "out/x"), "No space left on device: out/x"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ModuleNotFoundError("No module named 'datasets'", name="datasets"), "No module named 'datasets'"),
        (ValueError(), "ValueError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory; fewer --samples"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory; fewer --samples"),
        (MemoryError(), "out of memory; fewer --samples"),
    ],
)  # fmt: skip
def test_what_the_user_can_put_right_is_one_message_and_status_2(public, capsys, error, message, json_flag):
    public("quantize", raising(error))
    assert main(["quantize", "m", "o", *json_flag]) == 2
    assert only_error(capsys).startswith(message)


@pytest.mark.parametrize(
    "error", [RuntimeError("ours"), KeyError("ours"), ModuleNotFoundError("ours", name="lowbit.x")]
)
def test_a_mistake_of_ours_keeps_its_traceback(public, error):
    public("quantize", raising(error))
    with pytest.raises(type(error), match="ours"):
        main(["quantize", "m", "o"])


@pytest.mark.parametrize("how", ["--debug", "LOWBIT_DEBUG"])
def test_debug_shows_the_traceback_as_well(public, capsys, monkeypatch, how):
    public("inspect", raising(ValueError("damaged")))
    if how == "LOWBIT_DEBUG":
        monkeypatch.setenv(how, "1")
    assert main([*([how] if how == "--debug" else []), "inspect", "m"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("lowbit: error: damaged\n")


def test_eval_refuses_a_missing_text_before_it_loads_the_model(public, capsys):
    public("load", raising(AssertionError("must not be called")))
    assert main(["eval", MODEL, "--data", "nowhere.txt"]) == 2
    assert "nowhere.txt" in only_error(capsys)


def test_a_figure_that_json_cannot_hold_is_an_error(public, capsys):
    public("inspect", lambda path: SimpleNamespace(to_dict=lambda: {"error": float("nan")}))
    assert main(["inspect", "m", "--json"]) == 2
    only_error(capsys)


def test_a_missing_model_ends_with_status_2_and_one_message():
    done = run("eval", str(ROOT / "no-such-model"), "--data", TEXT)
    assert done.returncode == 2 and done.stdout == ""
    assert "no-such-model" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda_ends_with_status_2_and_one_message(capsys):
    assert main(["eval", MODEL, "--data", TEXT, "--device", "cuda"]) == 2
    assert "cuda" in only_error(capsys)


def test_ctrl_c_ends_with_status_130_and_one_line(interruptible):
    """A real interrupt of a real process, in the middle of a command's work."""
    code = """
        import sys, time, lowbit
        from lowbit.cli import main
        def quantize(*args, **options):
            print("working", file=sys.stderr, flush=True)
            time.sleep(60)
        lowbit.quantize = quantize
        sys.exit(main(["quantize", "m", "o", "--json"]))
    """
    line = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV) as process:
        assert process.stderr.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "lowbit: interrupted\n")


def test_a_reader_that_stops_reading_gets_no_error():
    code = """
        import lowbit
        from lowbit.cli import main
        class Long:
            def to_dict(self): return {}
            def __str__(self): return "row\\n" * 100_000
        lowbit.inspect = lambda model: Long()
        raise SystemExit(main(["inspect", "m"]))
    """
    line = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV) as process:
        assert process.stdout.readline() == "row\n"
        process.stdout.close()
        assert process.wait(timeout=30) == 1
        assert process.stderr.read() == ""
