"""Every row of the fault suite as data: what goes wrong, what must come of it, and who proves it.

A row's proof is a campaign (kills.py, damage.py) or tests by their ids; tests hold the exit code
and the words that the row names.  Ids are those of the list of faults the project keeps (S saving,
L loading, D distributed, N numerics, P preprocessing, I data files, C configuration).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """code: exit code of the process it happens to, "-" where there is none.

    tests: pytest ids, a prefix stands for all its parameters; campaign: a name in CAMPAIGNS, with
    share of the asked number of kills or flips.
    """

    id: str
    fault: str
    outcome: str
    code: str
    lost: str = "nothing"
    tests: tuple[str, ...] = ()
    campaign: str = ""
    share: float = 1.0


FAULTS, CHECKPOINT, TRAIN = "tests/faults/test_", "tests/checkpoint/test_", "tests/train/test_"
DATA, TOOLS, CONFIG = "tests/data/test_", "tests/tools/test_", "tests/config/test_"

ROWS = (
    # kills and damage: `make faults` does 200 kills and 100 flips of each kind of file
    Row("S1", "kill -9 while saving", "old or new loads", "-9", campaign="save", share=0.3),
    Row("L0", "kill -9 while loading", "the folder is unchanged", "-9", campaign="load", share=0.2),
    Row("L8", "kill -9 while training", "resumed to the same bits", "-9", "the step under way",
        campaign="train", share=0.2),
    Row("L8b", "the same on two ranks", "resumed to the same bits", "-9", "the step under way",
        campaign="train on two ranks", share=0.05),
    Row("P10", "kill -9 while preprocessing", "--resume: the same bytes", "-9", "a batch, done again",
        campaign="preprocess", share=0.25),
    *(Row(f"L2.{n}", f"bit flips: {kind}", outcome, code, campaign=kind)
      for n, (kind, outcome, code) in enumerate((
          ("weights", "all found, the older loads", "0"),
          ("optimizer", "all found, the older loads", "0"),
          ("manifest", "all found, the older loads", "0"),
          ("pointer", "told, the newest loads", "0"),
          (".bin", "all found with --verify-data", "3"),
          (".idx", "all found with --verify-data", "3"),
          (".meta.json", "found or without effect", "3"),
          ("index cache", "found with --verify-data", "0"),
          ("its description", "always found, built anew", "0")))),
    Row("L20", "crafted files, hashes true", "refused in words", "4", campaign="crafted"),
    Row("L18", "planted pickles", "never executed", "4", campaign="pickles"),
    # saving
    Row("S2", "crash at every operation", "old or new, to the bit", "-",
        tests=(FAULTS + "save_crashes.py::test_after_a_crash",)),
    Row("S4", "power cut at every operation", "old or new, to the bit", "-",
        tests=(FAULTS + "power_cut.py::test_a_save", FAULTS + "power_cut.py::test_the_simulation")),
    Row("S4b", "power cut while preprocessing", "whole pairs, resumed", "-",
        tests=(FAULTS + "power_cut.py::test_a_preprocessing",)),
    Row("S4c", "power cut in the index cache", "whole or built anew", "-",
        tests=(FAULTS + "power_cut.py::test_an_index_cache",)),
    Row("S4d", "crash while converting", "nothing or all", "5",
        tests=(TOOLS + "convert.py::test_a_crash",)),
    Row("S5", "disk full, I/O error: every op", "the old one stays, told", "5",
        tests=(FAULTS + "save_crashes.py::test_a_disk_that_fails",)),
    Row("S5b", "full and read-only file systems", "found at the start", "5",
        tests=(FAULTS + "start.py::test_a_full_file", FAULTS + "start.py::test_a_read_only")),
    Row("S7", "I/O error on one rank only", "all abort together", "5",
        tests=(CHECKPOINT + "saver.py::test_all_ranks_hear",)),
    Row("S8", "too little space for one", "found at the start", "5",
        tests=(FAULTS + "start.py::test_no_room",)),
    Row("S9", "a rank dies at a point of a save", "old or new loads", "6",
        tests=(FAULTS + "lost_ranks.py::test_a_save_survives",)),
    Row("S12", "SIGTERM to one rank", "step finished, saved", "75",
        tests=(TRAIN + "stop.py::test_a_signal_to_one",)),
    Row("S14", "SIGTERM, SIGUSR1, Ctrl-C alone", "step finished, saved", "75",
        tests=(TRAIN + "stop.py::test_a_signal_in_one",)),
    Row("S13", "a second signal", "ends at once, old one intact", "130, 143",
        tests=(TRAIN + "stop.py::test_a_second_signal",)),
    Row("S16", "the asynchronous writer fails", "heard at the next step", "5",
        tests=(CHECKPOINT + "saver.py::test_a_failing_writer", TRAIN + "resume.py::test_a_failing_save")),
    Row("S17", "the end with a save in flight", "waits; saved", "0",
        tests=(TRAIN + "resume.py::test_a_checkpoint_written_beside",)),
    Row("S19", "two starts into one --save", "the second refused, named", "5",
        tests=("tests/storage/test_lock.py", TRAIN + "folder.py::test_a_second",
               TRAIN + "folder.py::test_two_starts_of", TRAIN + "folder.py::test_no_checkpoint")),
    Row("S20", "--save renamed, removed, unmounted", "noticed, stops or warns", "5",
        "since the last checkpoint", tests=(TRAIN + "folder.py::test_a_folder_lost",)),
    Row("S21", "another run's checkpoints in --save", "refused, or removed whole", "2",
        tests=(TRAIN + "folder.py::test_another",)),
    Row("S18", "retention and a failing save", "the last good one stays", "5",
        tests=(CHECKPOINT + "saver.py::test_no_older", CHECKPOINT + "saver.py::test_which")),
    # loading and resuming
    Row("L1", "truncated, empty, flipped files", "the older one loads, told", "0",
        tests=(CHECKPOINT + "store.py::test_a_damaged",)),
    Row("L4", "no manifest, none intact", "refused", "4",
        tests=(CHECKPOINT + "store.py::test_no_intact",)),
    Row("L5", "a broken pointer", "the newest loads, told", "0",
        tests=(CHECKPOINT + "store.py::test_a_broken_pointer",)),
    Row("L6", "--load of nothing", "fresh and loud, or exit", "0, 4",
        tests=(TRAIN + "resume.py::test_a_missing_checkpoint",)),
    Row("L7", "stopped and resumed", "to the bit", "0", tests=(TRAIN + "resume.py::test_two_steps",)),
    Row("L9", "another layout on load", "to the bit, losses 1e-6", "0",
        tests=(CHECKPOINT + "store.py::test_any_layout",)),
    Row("L11", "another global batch on resume", "no gap, no repeat", "0",
        tests=(TRAIN + "resume.py::test_another_global",)),
    Row("L12", "other micro and global batches", "every sample once", "0",
        tests=(TRAIN + "resume_everywhere.py::test_every_sample",)),
    Row("L13", "other data on resume", "refused with what changed", "3",
        tests=(TRAIN + "origin.py::test_other_data",)),
    Row("L14", "another tokenizer on resume", "refused, both named", "4",
        tests=(TRAIN + "origin.py::test_another_tokenizer", TRAIN + "origin.py::test_a_damaged")),
    Row("L15", "another model's checkpoint", "all names and shapes", "4",
        tests=(CHECKPOINT + "store.py::test_another_shape",)),
    Row("L15b", "the same shapes, another model", "named, both values", "4",
        tests=(TRAIN + "model_change.py::test_another_model", CONFIG + "model_identity.py")),
    Row("L20b", "manifests: true hashes, absurd words", "refused within seconds", "4",
        tests=(TRAIN + "model_change.py::test_a_manifest", TRAIN + "model_change.py::test_a_learning")),
    Row("L5b", "pipes, devices, terabytes, links", "passed over, replaced", "0",
        tests=(CHECKPOINT + "store.py::test_what_is_no", CHECKPOINT + "store.py::test_what_bears")),
    Row("L5c", "newer than the pointer says", "told, with the flag", "0",
        tests=(CHECKPOINT + "store.py::test_a_newer",)),
    Row("L1b", "damage another rank finds", "the file named on all", "4",
        tests=(CHECKPOINT + "store.py::test_damage_that",)),
    Row("L18b", "pickled folders in convert.py", "refused, never opened", "4",
        tests=(TOOLS + "convert.py::test_what_is_no_gpt2",)),
    Row("L23", "the same crash after restarts", "given up, explained once", "its own",
        tests=(TRAIN + "restart.py::test_the_same_crash", TRAIN + "restart.py::test_a_crash_that")),
    # distributed
    Row("D1", "kill -9 of a rank at 8 points", "others name it", "6",
        tests=(FAULTS + "lost_ranks.py::test_a_killed",)),
    Row("D2", "a rank stops or hangs", "named within the timeout", "6",
        tests=(FAULTS + "lost_ranks.py::test_a_silent",)),
    Row("D3", "the first failure of a rank", "what all others print", "its own, 6",
        tests=(FAULTS + "lost_ranks.py::test_the_first",)),
    Row("D4", "ranks disagree on flags", "told in what", "2",
        tests=(FAULTS + "start.py::test_ranks_that",)),
    Row("D6", "sizes that do not divide", "numbers and the way out", "2",
        tests=tuple(f"{FAULTS}bad_input.py::test_training[{n}]" for n in
                    ("heads", "layers", "batch", "micro batch", "hidden size", "world size"))),
    Row("D7", "wrong launcher environment, port", "named", "2, 6",
        tests=(FAULTS + "start.py::test_a_wrong_environment", FAULTS + "start.py::test_two_processes")),
    Row("D10", "mismatched collectives", "named with --check-collectives", "6",
        tests=("tests/parallel/test_checking.py",)),
    Row("D8", "a node never joins", "the missing rank named", "6",
        tests=(FAULTS + "start.py::test_a_world",)),
    # output: what a run says is not the run
    Row("O1", "both outputs on a full disk", "trained, told in errors/", "0",
        tests=(FAULTS + "output.py::test_a_full_disk_under",)),
    Row("O2", "outputs closed, full, broken pipe", "trained, counted", "0",
        tests=(FAULTS + "output.py::test_the_launcher_ends", CONFIG + "streams.py::test_a_pipe")),
    Row("O3", "a reader that stands still", "trained; the text comes later", "0",
        tests=(CONFIG + "streams.py::test_what_waited", CONFIG + "streams.py::test_what_no_longer")),
    Row("O4", "a full disk under metrics.jsonl", "every record once, told", "0",
        tests=(FAULTS + "output.py::test_a_metrics_disk", "tests/telemetry/test_lasting.py")),
    Row("O5", "a full disk under TensorBoard", "trained, told", "0",
        tests=(FAULTS + "output.py::test_a_full_tensorboard",)),
    Row("O6", "a failing run without outputs", "its own code", "7",
        tests=(FAULTS + "output.py::test_a_failing_run",)),
    Row("O7", "no room for ended.json, timeline", "trained, told", "0",
        tests=(FAULTS + "output.py::test_what_only_describes",)),
    Row("O8", "results on a full disk, `| head`", "an error; silence", "5, 141",
        tests=(CONFIG + "streams.py::test_a_tool_whose",)),
    Row("S15", "SIGHUP, SIGQUIT, SIGXCPU", "step finished, saved", "75",
        tests=(TRAIN + "stop.py::test_a_signal_in_one", FAULTS + "output.py::test_other_requests")),
    # numerics
    Row("N1", "a loss or gradient is not finite", "all ranks stop or skip", "7",
        tests=(FAULTS + "numerics.py::test_a_nan", FAULTS + "numerics.py::test_a_skipped")),
    Row("N4", "a spike of loss or gradient", "told, skipped or fatal", "0, 7",
        tests=(FAULTS + "numerics.py::test_a_gradient", TRAIN + "guards.py::test_a_spike")),
    Row("N5", "a passing hardware fault", "told from a bug", "0",
        tests=(FAULTS + "numerics.py::test_a_passing",)),
    Row("N6", "replicas drift by one bit", "found, named", "7",
        tests=(TRAIN + "replicas.py::test_one_wrong_bit",)),
    Row("N7", "impossible numbers", "refused by name", "2",
        tests=(CONFIG + "rules.py::test_what_cannot", CONFIG + "flags.py::test_what_is_wrong")),
    # preprocessing and data files
    Row("P1", "bad lines", "file:line, or counted", "3",
        tests=(TOOLS + "preprocess_data.py::test_a_bad_line",
               TOOLS + "preprocess_data.py::test_skipped_lines")),
    Row("P2", "a worker dies", "ends soon, nothing left", "3, 70",
        tests=(TOOLS + "preprocess_data.py::test_a_death",)),
    Row("P11", "crash, full disk at every op", "nothing or whole, resumed", "5",
        tests=(TOOLS + "preprocess_data.py::test_a_full_disk",
               TOOLS + "preprocess_resume.py::test_a_crash")),
    Row("P16", "packed, columnar files damaged", "told with the offset", "3",
        tests=(DATA + "streams.py::test_a_packed", DATA + "streams.py::test_a_flipped",
               DATA + "streams.py::test_parquet", TOOLS + "preprocess_data.py::test_input_that")),
    Row("P17", "a line beyond --max-line-mb", "told, memory bounded", "3",
        tests=(DATA + "streams.py::test_what_is_longer", DATA + "streams.py::test_an_element")),
    Row("I1", "token files of another size", "both sizes, no SIGBUS", "3",
        tests=(DATA + "faults.py::test_a_bin",)),
    Row("I2", "hostile .idx files: 2 s of fuzzing", "only our errors", "3",
        tests=(DATA + "faults.py::test_two_seconds",)),
    Row("I11", "ranks start with a fresh cache", "the same order", "0",
        tests=(DATA + "faults.py::test_ranks_that_start",)),
    Row("I13", "bad data, blends, vocabulary", "file and flag named", "2, 3",
        tests=(FAULTS + "bad_input.py::test_training", FAULTS + "bad_input.py::test_preparing")),
    Row("P12", "half a tokenizer", "refused, what is missing named", "3",
        tests=(DATA + "fit.py::test_merges_that", DATA + "fit.py::test_an_empty",
               DATA + "fit.py::test_a_tokenizer_json", DATA + "fit.py::test_a_sentencepiece")),
    Row("I12", "tokens of another tokenizer", "refused with both names", "3",
        tests=(FAULTS + "bad_input.py::test_training[another tokenizer]",
               DATA + "provenance.py::test_a_file_of", DATA + "provenance.py::test_tools_refuse",
               TRAIN + "origin.py::test_the_data_of")),
    # configuration and environment
    Row("C1", "unknown flags, wrong values", "did you mean", "2",
        tests=(CONFIG + "flags.py::test_all_problems", CONFIG + "rules.py::test_all_failures")),
    Row("C3", "flags that contradict each other", "both named, all at once", "2",
        tests=(CONFIG + "rules.py::test_what_cannot", CONFIG + "rules.py::test_all_failures")),
    Row("C6", "an optional package is missing", "package and extra named", "2",
        tests=(FAULTS + "bad_input.py::test_a_missing", DATA + "tokenizers.py::test_without_the",
               "tests/telemetry/test_writers.py::test_a_missing")),
    Row("C5", "permissions", "named, the way out", "3, 5", tests=("tests/faults/test_permissions.py",)),
    Row("C9", "pickle, eval, exec, shell", "nowhere; loads never unpickle", "-",
        tests=("tests/architecture/test_habits.py", FAULTS + "unpickling.py")),
)  # fmt: skip
