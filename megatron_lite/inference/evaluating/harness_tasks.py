"""Which tasks lm-eval-harness knows: its own, and those of a folder whose files say, and run, nothing else.

The library's YAML can name Python to run, data to fetch and metrics that are programs.  In its own tasks
all that is part of the library, which was installed; in a file of a folder it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from megatron_lite.config.errors import ConfigError, DataError

_READERS = ("json", "csv", "text", "parquet", "arrow")
"""What `datasets` reads without running or unpickling anything."""
_CACHED = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PLAIN = "tag:yaml.org,2002:"
_LARGEST = 1 << 24  # bytes of a YAML file


@dataclass(slots=True)
class AskedTasks:
    """Tasks, groups and tags by name; refused: those of the folder that are not used, and why."""

    library: ModuleType
    names: Sequence[str]
    folder: str | None
    refused: dict[str, str] = field(default_factory=dict)
    _manager: Any = field(init=False)

    def __post_init__(self) -> None:
        """ConfigError where the folder is none."""
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ConfigError(f"--include-path {self.folder} is no folder")
        self._manager = self._choose_manager()
        metrics = set(self.library.api.registry.metric_registry)
        own = Path(str(self.library.__file__)).resolve().parent
        index: dict[str, Any] = self._manager.task_index
        for name, entry in index.items():
            if entry.yaml_path is not None and own not in Path(entry.yaml_path).resolve().parents:
                reason = next(objections(Path(entry.yaml_path), own, metrics), None)
                if reason is not None:
                    self.refused[name] = reason
        while more := {name: self.refused[part] for name, entry in index.items()
                       for part in _members(entry)
                       if part in self.refused and name not in self.refused}:  # fmt: skip
            self.refused |= more

    def _choose_manager(self) -> Any:
        """The library's index; of the folder alone where that has all: its own files are thousands."""
        make = self.library.tasks.TaskManager
        if self.folder is not None:
            small = make(include_path=self.folder, include_defaults=False)
            parts = [part for entry in small.task_index.values() for part in _members(entry)]
            if all(name in small.task_index for name in (*self.names, *parts)):
                return small
        return make(include_path=self.folder)

    def load(self) -> dict[str, Any]:
        """The library's tasks and groups, with their data.

        ConfigError for a name that there is not or that is refused, DataError where data are lacking.
        """
        for name in self.names:
            if name in self.refused:
                raise ConfigError(f"--lm-eval {name}: {self.refused[name]}")
        unknown = [name for name in self.names if name not in self._manager.task_index]
        if unknown:
            where = f", nor in --include-path {self.folder}" if self.folder else ""
            raise ConfigError(
                f"--lm-eval {', '.join(unknown)}: there is no such task in lm-eval-harness"
                f"{where}{self._broken()}"
            )
        try:
            loaded: dict[str, Any] = self._manager.load(list(self.names))
        except Exception as error:  # whatever a file or a data set can raise
            raise DataError(
                f"--lm-eval {', '.join(self.names)} cannot be read, and nothing is fetched "
                f"({type(error).__name__}: {' '.join(str(error).split())}) - mend the YAML file, or put the "
                "data where it looks: files, or the cache of `datasets`"
            ) from error
        return loaded

    def _broken(self) -> str:
        """Files of the folder that are no YAML: the task may be in one of them."""
        for path in sorted(Path(self.folder).glob("**/*.yaml")) if self.folder else ():
            try:
                _root(path)
            except DataError as error:
                return f"; {error}"
        return ""


def _members(entry: Any) -> list[str]:
    """What a group or a tag is made of."""
    if entry.kind.name == "TAG":
        return list(entry.tags)
    members = (entry.cfg or {}).get("task")
    if entry.kind.name != "GROUP" or not isinstance(members, list):
        return []
    names = [one.get("task", one.get("group")) if isinstance(one, dict) else one for one in members]
    return [name for name in names if isinstance(name, str)]


def objections(path: Path, library: Path, metrics: Iterable[str]) -> Iterator[str]:
    """What is not allowed in a task's YAML file and in those that it includes."""
    waiting, seen = [path], set[Path]()
    while waiting:
        file = waiting.pop().resolve()
        if file in seen or library in file.parents:
            continue
        seen.add(file)
        try:
            root = _root(file)
        except DataError as error:
            yield str(error)
            continue
        for node in _nodes(root):
            yield from _objections_to(file, node, metrics)
            if isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    if key.value == "include":
                        waiting += [file.parent / one for one in _texts(value)]


def _root(path: Path) -> yaml.Node | None:
    """The YAML of a file as nodes, of which nothing is made."""
    try:
        with path.open("rb") as file:
            return yaml.compose(file.read(_LARGEST), Loader=yaml.SafeLoader)
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path} is no YAML file ({' '.join(str(error).split())})") from None


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    """Each once, however often it is referred to."""
    waiting, seen = [root] if root is not None else [], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _texts(node: yaml.Node) -> list[str]:
    """All texts in it."""
    return [one.value for one in _nodes(node) if isinstance(one, yaml.ScalarNode)]


def _objections_to(path: Path, node: yaml.Node, metrics: Iterable[str]) -> Iterator[str]:
    line = f"{path}:{node.start_mark.line + 1}"
    if not node.tag.startswith(_PLAIN) or "python" in node.tag:
        yield (
            f"{line} has {node.tag}, which runs Python; only tasks that lm-eval-harness itself brings "
            "may - say it in Jinja, or take it out"
        )
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        yield from (f"{path}:{value.start_mark.line + 1}: {said}"
                    for said in _setting(str(key.value), value, metrics))  # fmt: skip


def _setting(key: str, value: yaml.Node, metrics: Iterable[str]) -> Iterator[str]:
    texts = _texts(value)
    if key.startswith("dataset") and any("://" in text for text in texts):
        yield f"{key} names an address; nothing is fetched - name files"
    elif key == "dataset_path" and not all(_is_read(text) for text in texts):
        yield (
            f"dataset_path {texts[0]} is none of {', '.join(_READERS)}, with data_files in dataset_kwargs, "
            "nor the OWNER/NAME of what the cache of `datasets` has"
        )
    elif key == "use_prompt":
        yield "use_prompt takes prompts from elsewhere - write doc_to_text"
    elif key == "hf_evaluate" and texts != ["false"]:
        yield "hf_evaluate takes a metric from elsewhere - take one of lm-eval-harness"
    elif key == "metric" and not set(texts) <= set(metrics):
        yield f"metric {texts[0]} is none of lm-eval-harness: {', '.join(sorted(metrics))}"


def _is_read(dataset: str) -> bool:
    known = _CACHED.fullmatch(dataset) and not Path(dataset).exists()
    return dataset in _READERS or bool(known)
