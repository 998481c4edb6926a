"""What must be free and present before a node starts: ports, data directory, memory and models, told all at once."""

import fcntl
import os
import re
import shlex
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import structlog

from node.capabilities.probe import total_memory
from node.config import LOCK_FILE, MEMORY_SHARE, NodeConfig, StartError
from node.engine.device import Device, DeviceError, cpu_device, find_devices, llamacpp_has_gpu
from node.joining import port_conflicts, second_node
from node.models.cache_checks import check_cache
from node.models.catalogue import catalogued_as
from node.models.errors import ModelError
from node.models.layout import GGUF
from node.models.store import ModelStore, UnknownModelError

MIN_MEMORY_BYTES: Final = 1 << 20
"""A lower memory limit is taken for a typing error."""

_logger = structlog.get_logger(__name__)

_MAY_BE_ID: Final = re.compile(r"[0-9a-f]{8,64}")


async def check_start(config: NodeConfig) -> Sequence[Device]:
    """Return the devices to compute on. Raises StartError, whose one line has all faults."""
    ports = port_conflicts(config)
    faults = [fault for _, fault in ports]
    if (fault := _directory_fault(config)) is not None:
        faults.append(fault)
    devices: Sequence[Device] = ()
    try:
        # Also where nothing is served: the capabilities that are announced name the devices.
        devices = await find_devices(config.device)
    except DeviceError as error:
        faults.append(f"cannot compute on {config.device}: {error}; see --device")
    counted = (cpu_device(),) if _computes_on_cpu(config) else devices
    faults += filter(None, (memory_fault(config, device) for device in counted))
    faults += _model_faults(config)
    cache = check_cache(config.cache_dir, config.serve, config.cache_limit_bytes)
    if cache.unwritable is not None and not cache.is_needed:
        _logger.warning("cache folder not writable", reason=cache.unwritable)
    faults += filter(None, (cache.unwritable if cache.is_needed else None, cache.full))
    if not faults:
        return devices
    hint = ""
    if ports or fault:
        options = _free_options(config, {"--data-dir" if fault else "", *(option for option, _ in ports)})
        hint = f"; {'a second node on this machine takes' if fault else 'free are'} {options}"
    raise StartError(f"{'; '.join(faults)}{hint}")


def _free_options(config: NodeConfig, flags: set[str]) -> str:
    """Return free values for options that are in conflict; all three where another node has the data directory."""
    options = second_node(config)
    pairs = zip(options[::2], options[1::2], strict=True)
    return shlex.join(word for pair in pairs if pair[0] in flags or "--data-dir" in flags for word in pair)


def _directory_fault(config: NodeConfig) -> str | None:
    try:
        with own_data_dir(config):
            return None
    except StartError as error:
        return str(error)


def _computes_on_cpu(config: NodeConfig) -> bool:
    """Return whether all that is to be served is known to be computed on the CPU, whatever GPU torch has."""
    store = ModelStore(config.cache_dir)
    names = [spec.model for spec in config.serve] + ([config.draft] if config.draft else [])
    with suppress(ModelError):
        packages = [store.find(store.resolve(name)) for name in names]
        formats = {package and package.manifest.format for package in packages}
        return formats == {GGUF} and not llamacpp_has_gpu()
    return False


def memory_fault(config: NodeConfig, device: Device) -> str | None:
    """Return what is wrong with a memory limit above what the device has, or too small for anything."""
    limit_bytes = config.memory_bytes
    if limit_bytes is None:
        return None
    total_bytes = total_memory()
    where = "this machine"
    if device.accelerator is not None:
        total_bytes, where = device.accelerator.memory_bytes, device.accelerator.name
    if limit_bytes > total_bytes:
        return (
            f"--memory: {_mebibytes(limit_bytes)} is more than {where} has, {_mebibytes(total_bytes)}; "
            f"lower it, or leave it out to use {MEMORY_SHARE:.0%} of the free memory"
        )
    if limit_bytes < MIN_MEMORY_BYTES:
        return (
            f"--memory: {limit_bytes} bytes are too few to serve anything; expected at least "
            f"{_mebibytes(MIN_MEMORY_BYTES)}, for example 4GiB"
        )
    return None


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _model_faults(config: NodeConfig) -> list[str]:
    """Return a line for each model to be served that no peer and no time can bring."""
    store = ModelStore(config.cache_dir)
    is_alone = not config.bootstrap and not config.mdns
    names = [spec.model for spec in config.serve] + ([config.draft] if config.draft else [])
    faults = []
    for name in dict.fromkeys(names):
        try:
            model = store.resolve(name)
            package = store.find(model)
        except UnknownModelError as error:
            if Path(name).exists():
                faults.append(f"cannot serve {name}: a source must be imported: `metaswarm model import {name}`")
            elif not _MAY_BE_ID.fullmatch(name):  # which a peer may know
                faults.append(f"cannot serve {name}: {error}")
        except ModelError as error:  # ambiguous, or a cache that this user cannot read
            faults.append(f"cannot serve {name}: {error}")
        else:
            has_source = catalogued_as(model) is not None and not config.no_catalogue
            if package is None and is_alone and not has_source:
                faults.append(
                    f"cannot serve {name}: it is not in {config.cache_dir}, and there are neither peers nor a "
                    "catalogue to fetch it from: add --bootstrap, or import it with `metaswarm model import`"
                )
    return faults


@contextmanager
def own_data_dir(config: NodeConfig) -> Iterator[None]:
    """Create the data directory and lock it: two nodes must not share an identity. Raises StartError."""
    try:
        config.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        keep_private(config.data_dir)
        lock = (config.data_dir / LOCK_FILE).open("w")
    except OSError as error:
        raise StartError(f"cannot use the data directory {config.data_dir}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(
                f"another node uses {config.data_dir}: stop it, or choose another directory with --data-dir"
            ) from None
        yield


def keep_private(data_dir: Path) -> None:
    """Restrict a data directory to its owner, unless it is shared, like /tmp or a home folder."""
    status = data_dir.stat()
    is_shared = status.st_mode & stat.S_ISVTX or data_dir.resolve() in {Path.home().resolve(), Path("/")}
    if status.st_uid == os.getuid() and status.st_mode & 0o077 and not is_shared:
        data_dir.chmod(0o700)
