import subprocess
import sys

import pytest
import torch
from random_checkpoint import SMALL, TOOLS, make_random_checkpoint, tool

from perl_megatron.checkpoint.compare import compare_checkpoints
from perl_megatron.checkpoint.open_weights import open_weights
from perl_megatron.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("tool") / "source")


def convert(*arguments):
    tool("convert_checkpoint").main([str(argument) for argument in arguments])


def test_there_and_back(source, tmp_path, capfd):
    convert(source, tmp_path / "a", "--to", "torch_dist", "--tp", "2", "--pp", "2")
    convert(tmp_path / "a", tmp_path / "b", "--to", "hf")
    weights = open_weights(source)
    assert compare_checkpoints(weights, open_weights(tmp_path / "b")).equal
    output = capfd.readouterr()
    total = sum(weights.info(name).nbytes for name in weights)
    assert f"b: {len(weights)} tensors, {total:,} bytes" in output.out
    assert "3.3/3.3 MB" in output.err  # the bar, at its end


def test_dry_run_writes_nothing(source, tmp_path, capsys):
    convert(source, tmp_path / "a", "--to", "torch_dist", "--dry-run")
    assert capsys.readouterr().out.count("->") == len(open_weights(source))
    assert list(tmp_path.iterdir()) == []


def test_companions_come_from_the_named_folder(source, tmp_path):
    convert(source, tmp_path / "a", "--to", "torch_dist")
    for file in ("config.json", "tokenizer.json", "manifest.json"):
        (tmp_path / "a" / file).unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        convert(tmp_path / "a", tmp_path / "b", "--to", "hf")
    convert(tmp_path / "a", tmp_path / "b", "--to", "hf", "--companions", source)
    assert (tmp_path / "b" / "tokenizer.json").exists()


def test_a_mistake_is_one_message_without_a_traceback(source, tmp_path):
    command = [sys.executable, TOOLS / "convert_checkpoint.py", source, source, "--to", "hf"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: the target exists")
    assert "Traceback" not in result.stderr


INTERRUPTED = """
import os, runpy, signal, sys
from perl_megatron.checkpoint import convert
from perl_megatron.checkpoint.conversion import Conversion
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell in the background has it ignored
run, tool, finished = Conversion.run, sys.argv[1], int(sys.argv[2])
def interrupted(self, *, progress, **options):
    journal = self.target_path.with_name(f".{self.target_path.name}.partial.jsonl")
    def stop(nbytes):
        progress(nbytes)
        if finished == 0 or (nbytes and journal.read_text().count("\\n") > finished):
            os.kill(os.getpid(), signal.SIGINT)
    run(self, progress=stop, **options)
Conversion.run = interrupted
plan = convert.plan_conversion
convert.plan_conversion = lambda *a, **k: plan(*a, max_file_bytes=100_000, **k)
sys.argv = sys.argv[:1] + sys.argv[3:]
runpy.run_path(tool, run_name="__main__")
"""


@pytest.mark.parametrize(("finished", "told"), [(0, "nothing is left behind"), (1, ".a.partial has what is finished")])
def test_an_interruption_is_one_line_that_says_how_to_go_on(source, tmp_path, finished, told):
    arguments = [TOOLS / "convert_checkpoint.py", str(finished), source, tmp_path / "a", "--to", "hf"]
    result = subprocess.run([sys.executable, "-c", INTERRUPTED, *arguments], capture_output=True, text=True)
    assert result.returncode == 130, result.stderr
    assert told in result.stderr.splitlines()[-1]
    assert ("--resume" in result.stderr) == bool(finished)
    assert "Traceback" not in result.stderr
    assert (tmp_path / ".a.partial").exists() == bool(finished)


def test_random_weights_are_the_same_for_a_seed_and_finite(source, tmp_path):
    made = tool("make_random_weights").make_random_weights(tmp_path / "again", SMALL / "config.json")
    again, other = open_weights(tmp_path / "again"), open_weights(source)
    assert made == sum(again.info(name).nbytes for name in again)
    assert compare_checkpoints(again, other).equal
    assert all(again[name].isfinite().all() for name in again)
    assert len({again[name].view(-1)[0].item() for name in again}) > len(again) // 2
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    bits = again["model.embed_tokens.weight"].view(torch.int16)
    assert all(0.49 < (bits >> bit & 1).float().mean() < 0.51 for bit in range(16))
