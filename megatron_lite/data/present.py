"""Whether the files that a run names are on this machine: checked before waiting for other ranks."""

from __future__ import annotations

from pathlib import Path

from megatron_lite.config.blend import blends
from megatron_lite.config.errors import DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.indexed import bin_path, idx_path

_SHOWN = 10


def require_local_files(data: DataConfig) -> None:
    """Raise DataError naming all that are not there, with their flags; opens none."""
    named: list[tuple[str, str | None]] = []
    if data.tokenizer_type == "GPT2BPETokenizer":
        named = [("--vocab-file", data.vocab_file), ("--merge-file", data.merge_file)]
    elif data.tokenizer_type != "NullTokenizer":
        named = [("--tokenizer-model", data.tokenizer_model)]
    missing = [f"{flag} {path}" for flag, path in named if path and _is_missing(Path(path))]
    if not data.mock_data:
        found = blends(data)
        for blend in filter(None, (found.shared, *found.by_split.values())):
            for prefix in blend.prefixes:
                paths = (idx_path(prefix), bin_path(prefix))
                missing += [f"data {path}" for path in paths if _is_missing(path)]
    if missing:
        listed = "".join(f"\n  {line}" for line in dict.fromkeys(missing[:_SHOWN]))
        more = f"\n  and {len(missing) - _SHOWN} more" if missing[_SHOWN:] else ""
        raise DataError(
            f"files that are not on this machine:{listed}{more}\ncopy them here, or name others (a data "
            "path is a prefix, without .bin and .idx)"
        )


def _is_missing(path: Path) -> bool:
    """False for what only cannot be looked at: the reader says why."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
