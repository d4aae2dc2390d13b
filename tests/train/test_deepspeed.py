"""A run by a user's ds.json is the run of the flags that it stands for."""

from __future__ import annotations

import pytest

from tests.config.ds_files import ADADELTA, DsFolder
from tests.support.launch import TINY
from tests.support.sizes import with_flags
from tests.train.runs import run_main, steps

FLAGS = (
    "--optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0 --lr 5e-5 --lr-warmup-init 1e-5 "
    "--lr-warmup-iters 10 --lr-decay-style constant --clip-grad 1 --fp16 --initial-loss-scale 65536 "
    "--loss-scale-window 100 --micro-batch-size 4 --global-batch-size 128 --use-distributed-optimizer"
)  # fmt: skip


@pytest.mark.ci
def test_all_keys_of_the_file_but_its_optimizers_type_train_as_their_flags_do(tmp_path) -> None:
    own = with_flags(
        TINY, "--num-layers", "1", "--train-iters", "11", "--use-cpu", "--print-state-hash",
        "--num-workers", "0", without=("--lr", "--micro-batch-size", "--global-batch-size"),
    )  # fmt: skip
    words = DsFolder(tmp_path).write(ADADELTA.replace("Adadelta", "AdamW"))
    by_file = run_main(*own, *words, "--save", str(tmp_path / "file"))
    by_flags = run_main(*own, *FLAGS.split(), "--save", str(tmp_path / "flags"))
    assert by_file.rc == by_flags.rc == 0, by_file.err
    assert by_file.state_hash == by_flags.state_hash
    rates = [step.learning_rate for step in steps(tmp_path / "file")]
    assert rates == pytest.approx([1e-5 + 4e-6 * n for n in range(1, 11)] + [5e-5])
