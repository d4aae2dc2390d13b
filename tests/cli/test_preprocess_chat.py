"""preprocess_data.py --chat: whatever shape conversations are kept in, exact, counted, resumable."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.cli import merge_datasets
from megatron_lite.config.errors import DataError
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.masks import MaskedDataset
from megatron_lite.data.preparing.chat_encode import ChatJob
from megatron_lite.data.preparing.check import check_hashes
from megatron_lite.data.preparing.dialogues import SHAPES, AskedBy, Dialogues
from megatron_lite.data.preparing.encode import Job
from megatron_lite.data.preparing.ray_engine import join
from megatron_lite.data.preparing.records import BadRecord
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.faults import FaultyDisk, RecordingDisk, SimulatedCrash
from tests.support.extras import needs
from tests.support.preprocess import TOOL, call, hashes, write_lines
from tests.support.talks import chat_tokenizer, numbers, prepare, talk

ONE = [("user", "Add.\n1 2"), ("assistant", "3")]
TWO = [("system", "Brief."), *ONE, ("user", "More?"), ("assistant", "No.")]
RECORDS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "messages": (talk("Add.\n1 2", "3", "More?", "No.", system="Brief."), TWO),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Add.\n"},
                                                         {"type": "text", "text": "1 2"}]},
                            {"role": "assistant", "content": "3"}]}, ONE),
    "sharegpt": ({"system": "Brief.", "conversations": [
        {"from": "human", "value": "Add.\n1 2"}, {"from": "gpt", "value": "3"},
        {"from": "human", "value": "More?"}, {"from": "gpt", "value": "No."}]}, TWO),
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, ONE),
    "belle": ({"instruction": "Add.\n1 2", "input": "", "output": "3"}, ONE),
    "history": ({"instruction": "More?", "output": "No.", "system": "Brief.",
                 "history": [["Add.\n1 2", "3"]]}, TWO),
    "prompt-answer": ({"prompt": "Add.\n1 2", "answer": "3"}, ONE),
    "prompt-completion": ({"prompt": "Add.\n1 2", "completion": "3"}, ONE),
    "prompt-response": ({"prompt": "Add.\n1 2", "response": "3"}, ONE),
    "question-answer": ({"question": "Add.\n1 2", "answer": "3"}, ONE),
    "a last question": (talk("Add.\n1 2", "3", "And now?"), ONE),
    "a blank system text": (talk("Add.\n1 2", "3", system=" "), ONE),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_each_shape_becomes_the_same_messages(name: str) -> None:
    record, expected = RECORDS[name]
    for read in (Dialogues(), *([Dialogues(name)] if name in SHAPES else [])):
        found = read(record)
        assert [tuple(message) for message in found.messages] == expected
        answers = {n for n, (role, _) in enumerate(expected) if role == "assistant"}
        assert found.learned == answers


def test_any_other_shape_by_templates_of_ones_own() -> None:
    """An encyclopedia's article as an answer to its title."""
    read = Dialogues(
        recipe=AskedBy("介绍一下{title}。", "{summary}\n{sections[].content}", "{role?}")
    )
    found = read({"title": "猫", "summary": "动物。", "sections": [{"content": "毛。"}]})
    assert [tuple(message) for message in found.messages] == [
        ("user", "介绍一下猫。"), ("assistant", "动物。\n毛。"),
    ]  # fmt: skip
    assert read.columns == ["title", "summary", "sections", "role"]
    same = Dialogues(recipe=AskedBy("{a}", "{b}", "Be brief."))({"a": "x", "b": "y"})
    assert [tuple(message) for message in same.messages] == [
        ("system", "Be brief."), ("user", "x"), ("assistant", "y"),
    ]  # fmt: skip


def test_an_answer_of_weight_0_and_a_blank_one_are_only_read() -> None:
    record = talk("a", "b", "c", "d", "e", " ")
    record["messages"][1]["weight"] = 0
    assert Dialogues()(record).learned == {3}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "unknown shape"),
        ({"messages": "x"}, "no messages"),
        ({"messages": [{"role": "user"}]}, "no messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": 3}]}, "no text"),
        ({"messages": [{"role": "user", "content": "x", "weight": 0.5}]}, "no messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "no messages"),
        ({"prompt": "x", "answer": ["y"]}, "no text"),
        ({"system": "a", "conversations": [{"from": "system", "value": "b"}]}, "two system texts"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_says_why(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecord) as caught:
        Dialogues()(record)
    assert caught.value.reason == reason


def flags(folder: Path, source: Path, *more: str) -> list[str]:
    return ["--chat", "--input", str(source), "--output-prefix", str(folder / "x"), "--workers", "1",
            "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder), *more]  # fmt: skip


def test_a_table_and_one_broken_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named by file and line, or counted; so are what has nothing to learn and what is out of turn."""
    chat_tokenizer(tmp_path)
    table = tmp_path / "a.csv"
    table.write_text('prompt,answer\nHi,"Hello, you"\nBye,Bye\n')
    assert call(monkeypatch, *flags(tmp_path, table, "--chat-template", "plain")) == 0
    found = MaskedDataset(tmp_path / "x")
    assert [int(m.sum()) for m in (found.mask(n, len(found[n])) for n in range(2))] == [11, 4]
    lines = write_lines(tmp_path / "b.jsonl", *numbers(3), {"messages": []}, talk("a", " "))
    lines.write_text(lines.read_text() + '{"messages": [\n' + json.dumps(
        {"messages": [{"role": "assistant", "content": "b"}]}) + "\n")  # fmt: skip
    given = flags(tmp_path, lines, "--overwrite", "--chat-template", "chatml")
    assert call(monkeypatch, *given) == DataError.exit_code
    assert "b.jsonl:6: no JSON" in capsys.readouterr().err
    nothing = write_lines(tmp_path / "c.jsonl", {"messages": []}, talk("a", " "))
    assert call(monkeypatch, *flags(tmp_path, nothing, "--overwrite")) == DataError.exit_code
    assert "no sample - 2 conversations have no token to learn" in capsys.readouterr().err
    assert call(monkeypatch, *given, "--on-bad-line", "skip") == 0
    told = capsys.readouterr().out
    assert "conversations: 3 samples" in told and "2 dropped without a token to learn" in told
    assert "skipped: 2 records (1 no JSON, 1 no conversation)" in told
    facts = json.loads((tmp_path / "x.meta.json").read_text())
    learned = len("011222") + 3 * len("Yes.") + 6  # the answers of numbers(3), and their ends
    assert facts["chat"]["counts"] == {"kept": 3, "weightless": 2, "learned tokens": learned}
    assert facts["loss_mask"]["suffix"] == "_loss_mask" and facts["chat"]["ends"] == [259]


def test_rows_of_parquet_are_the_lines_of_json(tmp_path: Path) -> None:
    """Lists of structs, whose keys are there in every row and may be null."""
    arrow, parquet = needs("pyarrow"), needs("pyarrow.parquet")
    data = chat_tokenizer(tmp_path)
    records = [*numbers(9), talk("a", "b", "c", "d", system="Brief.")]
    records[3]["messages"][1]["weight"] = 0
    source = write_lines(tmp_path / "a.jsonl", *records)
    table = arrow.Table.from_pylist(
        [record | {"id": 1, "conversations": None} for record in records]
    )
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    found = []
    for path in (source, tmp_path / "a.parquet"):
        summary = prepare(
            data, path, tmp_path / path.suffix / "x", batch_bytes=200, template="chatml"
        )
        found.append((hashes(tmp_path / path.suffix, "x*.[bi]*"), summary.told))
    assert found[0] == found[1] and found[0][1]["kept"] == 10
    turned = arrow.table({"messages": [[{"role": "assistant", "content": "x"}], None]})
    parquet.write_table(turned, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet:1: .*message 1 is of assistant"):
        prepare(data, tmp_path / "b.parquet", tmp_path / "b", template="chatml")


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    data = chat_tokenizer(tmp_path)
    source = write_lines(tmp_path / "a.jsonl", *numbers(60))
    found = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        prepare(data, source, folder / "x", workers=workers, batch_bytes=900, template="chatml")
        found.append(hashes(folder, "x*.[bi]*"))
    assert len(found[0]) == 4 and found[0] == found[1]


@pytest.mark.ci
def test_killed_at_any_operation_and_taken_up_it_is_the_same(tmp_path: Path) -> None:
    """Never a pair without its mask, and the counts of the whole."""
    data = chat_tokenizer(tmp_path)
    source = write_lines(tmp_path / "a.jsonl", *numbers(12), talk("a", ""))

    def attempt(folder: Path, disk: Disk, resume: bool) -> Any:
        return prepare(data, source, folder / "x", disk=disk, resume=resume, template="plain",
                       batch_bytes=300, mark_seconds=0)  # fmt: skip

    recorded = RecordingDisk()
    whole = attempt(tmp_path / "whole", recorded, False)
    expected = hashes(tmp_path / "whole", "x*.[bi]*")
    for k in range(0, len(recorded.operations), 3):
        folder = tmp_path / str(k)
        with pytest.raises(SimulatedCrash):
            attempt(folder, FaultyDisk(fail_at=k, crash="raise", tear=True), False)
        if (folder / "x.idx").exists():
            MaskedDataset(folder / "x")
        again = attempt(folder, Disk(), True)
        assert hashes(folder, "x*.[bi]*") == expected, k
        assert again.told == whole.told and again.keys[0].documents == 12
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--template", "{text}"], "--template is about texts"),
        (["--append-eod"], "--append-eod is about texts"),
        (["--json-keys", "a"], "--json-keys is about texts"),
        (["--chat-user", "{a}"], "give both"),
        (["--chat-user", "{a}", "--chat-assistant", "{b}", "--chat-shape", "alpaca"], "exclude each"),
        (["--chat-user", "a", "--chat-assistant", "{b}"], "--chat-user 'a' has no field"),
        (["--seq-length", "0"], "--seq-length 0 must be at least 1"),
        (["--chat-template", "nowhere"], "--chat-template nowhere is no file"),
    ],
    ids=["template", "eod", "keys", "half", "two shapes", "no field", "length", "no template"],
)  # fmt: skip
def test_flags_that_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    more: list[str], said: str,
) -> None:  # fmt: skip
    chat_tokenizer(tmp_path)
    source = write_lines(tmp_path / "a.jsonl", talk("a", "b"))
    assert call(monkeypatch, *flags(tmp_path, source, *more)) == 2
    assert said in capsys.readouterr().err
    without = [
        word for word in flags(tmp_path, source, "--chat-template", "plain") if word != "--chat"
    ]
    assert call(monkeypatch, *without) == 2
    assert "it needs --chat" in capsys.readouterr().err


def test_other_settings_do_not_go_on_with_what_is_there(tmp_path: Path) -> None:
    data = chat_tokenizer(tmp_path)
    source = write_lines(tmp_path / "a.jsonl", *numbers(3))
    prepare(data, source, tmp_path / "x", template="plain")
    before = np.array(IndexedDataset(tmp_path / "x")[0])
    assert prepare(data, source, tmp_path / "x", template="plain", resume=True).resumed
    with pytest.raises(Exception, match="is there already"):
        prepare(data, source, tmp_path / "x", template="chatml", resume=True)
    assert (IndexedDataset(tmp_path / "x")[0] == before).all()


def test_shards_merged_are_the_whole_mask_included(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_tokenizer(tmp_path)
    source = write_lines(tmp_path / "a.jsonl", *numbers(20))
    given = flags(tmp_path, source, "--chat-template", "plain")
    assert call(monkeypatch, *given) == 0
    shards = tmp_path / "shards"
    shards.mkdir()
    given[given.index("--output-prefix") + 1] = str(shards / "s")
    for n in (1, 2, 3):
        assert call(monkeypatch, *given, "--shard", f"{n}/3") == 0
    merged = ["--input", str(shards), "--output-prefix", str(tmp_path / "m")]
    assert merge_datasets.main(merged) == 0
    for suffix in ("bin", "idx"):
        for name in ("", "_loss_mask"):
            whole, joined = (tmp_path / f"{p}{name}.{suffix}" for p in "xm")
            assert whole.read_bytes() == joined.read_bytes()
    facts = [json.loads((tmp_path / f"{p}.meta.json").read_text()) for p in "xm"]
    assert facts[0]["chat"] == facts[1]["chat"] and facts[0]["loss_mask"] == facts[1]["loss_mask"]
    assert check_hashes(tmp_path / "m")
    for shard in shards.glob("s_*"):  # as the tasks of --engine ray are joined
        shutil.copy(shard, tmp_path)
    job = Job(chat_tokenizer(tmp_path), chat=ChatJob("plain"))
    summary = join(job, str(tmp_path / "s"), 3, Disk())
    assert hashes(tmp_path, "s*.[bi]*") == {
        f"s{name[1:]}": found for name, found in hashes(tmp_path, "x*.[bi]*").items()
    }
    assert dict(summary.told) == facts[0]["chat"]["counts"] and check_hashes(tmp_path / "s")
    mask = tmp_path / "m_loss_mask.bin"
    mask.write_bytes(mask.read_bytes()[::-1])
    with pytest.raises(DataError, match=r"m_loss_mask\.bin has another SHA-256"):
        check_hashes(tmp_path / "m")
    (shards / "s_1-of-3_loss_mask.idx").unlink()
    with pytest.raises(DataError, match="has no loss mask beside it, and others have"):
        merge_datasets.main([*merged, "--overwrite"])


@pytest.mark.oracles
def test_a_local_ray_cluster_writes_the_same_bytes(tmp_path: Path) -> None:
    """By a template that lies where the command is given."""
    needs("ray")
    chat_tokenizer(tmp_path)
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    (tmp_path / "mine.jinja").write_text(template)
    source = write_lines(tmp_path / "a.jsonl", *numbers(40))
    common = [sys.executable, str(TOOL), *flags(tmp_path, source, "--chat-template", "mine.jinja")]
    subprocess.run(common, check=True, cwd=tmp_path)
    ray = ["--engine", "ray", "--ray-address", "local", "--shards", "3"]
    common[common.index("--output-prefix") + 1] = str(tmp_path / "r")
    subprocess.run([*common, *ray], check=True, cwd=tmp_path)
    assert hashes(tmp_path, "r*.[bi]*") == {
        f"r{name[1:]}": found for name, found in hashes(tmp_path, "x*.[bi]*").items()
    }


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", "line 2: TemplateSyntaxError"),
        ("{% for m in messages %}\n\n{% generation %}x{% endfor %}", "line 3: .*endgeneration"),
    ],
)
def test_a_template_that_is_none_is_told_before_any_record_is_read(
    template: str, said: str, tmp_path: Path
) -> None:
    """Else --on-bad-line skip would count every record as a bad one."""
    needs("jinja2")
    (tmp_path / "mine.jinja").write_text(template)
    lines = write_lines(tmp_path / "talks.jsonl", *numbers(2))
    with pytest.raises(DataError, match=f"(?s)mine.jinja: .*{said}"):
        prepare(chat_tokenizer(tmp_path), lines, tmp_path / "talks", on_bad_line="skip",
                template=str(tmp_path / "mine.jinja"))  # fmt: skip
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob(".*"))
