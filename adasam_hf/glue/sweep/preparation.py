"""What would make every run of a sweep fail, found before the first one."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..arguments import parse
from ..data import load_task, resolve_path
from ..tasks import get_task
from .run import Run, device_flags


def prepare(runs: Sequence[Run], machine: Sequence[str], folders: Iterable[Path]) -> None:
    """What would make every run fail, before the first one: data (which is fetched once, here), model, and folders.

    Raises:
        ValueError, OSError: with what is wrong.
    """
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):  # to be writable is not a matter of flags alone
            pass
    seen = set()
    for run in runs:
        model_args, data_args, args = parse([*run.words, "--output_dir=unused", *device_flags(), *machine])
        model = resolve_path(model_args.model_name_or_path)
        if model.startswith((".", "/")) and not Path(model).is_dir():
            raise FileNotFoundError(
                f"{run.name}: model_name_or_path={model!r} is no folder; see its config or arguments"
            )
        for name in ("train_file", "validation_file"):
            file = getattr(data_args, name)
            if file is not None and not Path(resolve_path(file)).expanduser().is_file():
                raise FileNotFoundError(f"{run.name}: {name}={file!r} does not exist")
        if data_args.train_file is None and data_args.task_name is not None and data_args.task_name not in seen:
            task = get_task(data_args.task_name)
            splits = ["train", *(split for split, _ in task.evaluations)]
            load_task(task, data_args.dataset_name_or_path, splits, model_args.cache_dir, args.hub_token)
            seen.add(task.name)
