"""A storage that is no file system, in this process's memory: no folders, and a file is there when it is closed."""

from __future__ import annotations

from importlib.metadata import version

from fsspec.implementations.memory import MemoryFileSystem


def attach_memory() -> MemoryFileSystem:
    """Let Airflow's object storage reach ``memory://``, and return it, empty."""
    if version("apache-airflow").startswith("2."):
        from airflow.io.store import attach
    else:
        from airflow.sdk.io import attach

    storage = MemoryFileSystem()
    storage.store.clear()
    storage.pseudo_dirs[:] = [""]
    attach("memory", fs=storage)
    return storage
