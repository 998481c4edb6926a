"""Checks of this machine: data directory, device, ports, and the files of identity, history and models."""

import fcntl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from node.config import LOCK_FILE, MEMORY_SHARE, NodeConfig, ServeSpec
from node.doctor.report import Consequence, Fault, Finding, RunningNode
from node.engine.device import CPU, Device, DeviceError, cpu_device, find_devices
from node.identity import KEY_FILE, IdentityError, load_or_create
from node.models.cache_checks import check_cache, writing_fault
from node.models.errors import ModelError
from node.models.files import disk_fault
from node.models.layout import GGUF
from node.models.store import ModelStore, Package, UnknownModelError
from node.network.addresses import TcpAddress, parse_address
from node.network.interface import NetworkError
from node.network.transport import bind
from node.stages.device_shares import cpu_bytes_of_each, shares_of_spans, split_over, usable_shares
from node.stages.memory_admission import shortage, smallest_span, span_bytes_for
from node.storage.database import DATABASE_FILE, StorageError, find_damage
from node.util.child_process import ChildError, run
from node.util.interpreter import python
from protocol.identity import ModelId

_FETCHED_AGAIN: Final = "the node fetches it again from peers; if none has it, import the model again"
LLAMACPP_BUILD: Final = python("-m", "node.engine.llamacpp.build")
CHECK_TIME_LIMIT_S: Final = 30.0


def check_data_dir(config: NodeConfig, running: RunningNode | None) -> Iterator[Finding]:
    """Check access to the data directory, or to where it would be made, its lock and its disk."""
    folder = config.data_dir
    if (fault := writing_fault(folder)) is not None:
        yield Finding(Fault.NAME_TAKEN, Consequence.START, f"{fault}: choose another --data-dir")
        return
    if running is None and _is_locked(folder / LOCK_FILE):
        message = f"another node uses {folder} and its API does not answer: stop it, or choose another --data-dir"
        yield Finding(Fault.NAME_TAKEN, Consequence.START, message)
    if (full := disk_fault(folder)) is not None:
        yield Finding(Fault.DISK_FULL, Consequence.SERVE, full)


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


async def check_devices(config: NodeConfig) -> tuple[Sequence[Device], list[Finding]]:
    """Return the devices that the node would use, and findings."""
    try:
        return await find_devices(config.device), []
    except DeviceError as error:
        message = f"cannot compute on {config.device}: {error}; see --device"
        return [cpu_device()], [Finding(Fault.NO_DEVICE, Consequence.START, message)]


async def check_llamacpp(config: NodeConfig) -> tuple[str | None, list[Finding]]:
    """Return the build of llama.cpp that serves GGUF packages, None with a finding where it is unusable.

    That is grave where the node serves a model that is, or may be, such a package.
    """
    try:
        found = await run(LLAMACPP_BUILD, what="the check of llama.cpp", time_limit_s=CHECK_TIME_LIMIT_S)
    except ChildError as error:
        why = error.last_line or f"{error}: llama.cpp is damaged; `pip install --force-reinstall xllamacpp`"
        return None, [Finding(Fault.NO_LLAMACPP, Consequence.SERVE, why, grave=_serves_gguf(config))]
    return found.decode().strip(), []


def _serves_gguf(config: NodeConfig) -> bool:
    store = ModelStore(config.cache_dir)
    for name in (*(spec.model for spec in config.serve), *filter(None, [config.draft])):
        try:
            package = store.find(store.resolve(name, []))
        except ModelError:
            package = None
        if package is None or package.manifest.format == GGUF:
            return True
    return False


async def check_ports(config: NodeConfig) -> list[Finding]:
    """Check that the node could bind its ports."""
    wanted = [(f"--listen {text}", parse_address(text)) for text in config.listen]
    if config.api_host != "localhost":
        kind = "ip6" if ":" in config.api_host else "ip4"
        api = TcpAddress(kind, config.api_host, config.api_port, None)
        wanted.append((f"--api {config.api_host}:{config.api_port}", api))
    findings = []
    for option, address in wanted:
        try:
            for listener in await bind(address):
                await listener.aclose()
        except NetworkError as error:
            findings.append(Finding(Fault.NAME_TAKEN, Consequence.START, f"{option}: {error}: choose another port"))
    return findings


def check_files(config: NodeConfig, devices: Sequence[Device], running: RunningNode | None) -> list[Finding]:
    """Check key, database and model files. Hashes what is to be served, which may take a while."""
    return [*_check_own_files(config), *_check_cache(config), *_check_models(config, devices, running)]


def _check_cache(config: NodeConfig) -> Iterator[Finding]:
    faults = check_cache(config.cache_dir, config.serve, config.cache_limit_bytes)
    if faults.unwritable is not None:
        yield Finding(Fault.NAME_TAKEN, Consequence.SERVE, faults.unwritable, grave=faults.is_needed)
    if faults.full is not None:
        yield Finding(Fault.DISK_FULL, Consequence.SERVE, faults.full)


def _check_own_files(config: NodeConfig) -> Iterator[Finding]:
    if (config.data_dir / KEY_FILE).exists():
        try:
            load_or_create(config.data_dir)
        except IdentityError as error:
            yield Finding(Fault.CORRUPT_FILE, Consequence.START, str(error))
    database = config.data_dir / DATABASE_FILE
    try:
        damage = find_damage(database)
    except (StorageError, OSError) as error:
        damage = str(error)
    if damage is not None:
        message = f"{database} is damaged ({damage}): restart the node, which sets it aside and syncs with the swarm"
        yield Finding(Fault.CORRUPT_FILE, Consequence.SERVE, message)


def _check_models(config: NodeConfig, devices: Sequence[Device], running: RunningNode | None) -> Iterator[Finding]:
    store = ModelStore(config.cache_dir)
    known = [ModelId(model["model"]) for model in running.models] if running else []
    loaded = {span["model"] for span in running.status["spans"]} if running else set()
    for spec in config.serve:
        try:
            model_id = store.resolve(spec.model, known)
            package = store.find(model_id)
            if package is None:  # the node fetches it when it starts
                if store.size_bytes(model_id):
                    message = f"the manifest of {spec.model} is damaged: {_FETCHED_AGAIN}"
                    yield Finding(Fault.CORRUPT_FILE, Consequence.SERVE, message)
                continue
            fault = None if spec.blocks is None else package.manifest.cuts.fault(spec.blocks)
            if fault is not None:
                yield Finding(Fault.MISSING_BLOCK, Consequence.START, f"cannot serve {spec}: {fault}")
                continue
            yield from _check_package(spec, store, package)
            if package.model_id not in loaded:
                yield from _check_memory(spec, package, config, devices)
        except UnknownModelError as error:
            yield Finding(Fault.UNKNOWN_MODEL, Consequence.SERVE, str(error))
        except ModelError as error:
            yield Finding(Fault.CORRUPT_FILE, Consequence.SERVE, str(error))


def _check_package(spec: ServeSpec, store: ModelStore, package: Package) -> Iterator[Finding]:
    # Where the node chooses its blocks itself, every file that is here may be among them.
    for name in store.verify(package.model_id, spec.blocks).corrupt:
        message = f"{package.path / name} does not match its hash: {_FETCHED_AGAIN}"
        yield Finding(Fault.CORRUPT_FILE, Consequence.SERVE, message)


def _check_memory(
    spec: ServeSpec, package: Package, config: NodeConfig, devices: Sequence[Device]
) -> Iterator[Finding]:
    manifest, specs, has_draft = package.manifest, list(dict.fromkeys(config.serve)), config.draft is not None
    memory_bytes = [config.memory_bytes or int(device.free_bytes * MEMORY_SHARE) for device in devices]
    shares_of_all = shares_of_spans(devices, memory_bytes, len(specs), draft=has_draft)
    cpu_bytes = cpu_bytes_of_each(config.memory_bytes, len(specs) + has_draft)
    shares = usable_shares(manifest, shares_of_all[specs.index(spec)], cpu_bytes)
    if spec.blocks is None:
        shares = [max(shares, key=lambda share: share.memory_bytes)]
    parts = split_over(manifest, spec.blocks or smallest_span(manifest, shares[0].device), shares)
    on_one = -(-(len(specs) + has_draft) // (1 if shares[0].device == CPU else len(devices)))
    for blocks, share in zip(parts, shares, strict=False):
        if (why := shortage(manifest, blocks, share.memory_bytes, share.device)) is None:
            continue
        needed = span_bytes_for(manifest, blocks, share.device) * on_one >> 20
        several = f" for its {on_one} spans" if on_one > 1 else ""
        instead = f"give the node --memory {needed}MiB{several}, or fewer blocks"
        message = f"cannot serve {spec.model}:{blocks}: {why}; {instead}"
        yield Finding(Fault.NO_MEMORY, Consequence.SERVE, message)
