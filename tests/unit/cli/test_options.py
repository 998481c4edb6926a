import os
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import click
import pytest

from node.cli.options import NODE_OPTIONS, read_config, refuse_unknown_variables
from node.config import ApiKey, ConfigError, NodeConfig, ServeSpec, default_cache_dir, default_data_dir
from protocol.identity import BlockRange, peer_id_from_public_key

PEER = peer_id_from_public_key(bytes(32))
ADDRESS = f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER}"
OTHER_ADDRESS = f"/dns4/swarm.example.org/tcp/4001/p2p/{PEER}"


def load(environ: Mapping[str, str] | None = None, **flags: str | list[str]) -> NodeConfig:
    arguments = [
        f"--{name.replace('_', '-')}={value}"
        for name, given in flags.items()
        for value in ([given] if isinstance(given, str) else given)
    ]
    with mock.patch.dict(os.environ, environ or {}):
        return read_config(*arguments)


@pytest.fixture(autouse=True)
def no_variables(bare_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("METASWARM_")]:
        monkeypatch.delenv(name)


def fault(environ: Mapping[str, str] | None = None, **flags: str | list[str]) -> str:
    """Return the one line that a wrong configuration gives."""
    with pytest.raises((click.UsageError, ConfigError)) as caught:
        load(environ, **flags)
    error = caught.value
    message = error.format_message() if isinstance(error, click.UsageError) else str(error)
    assert "\n" not in message
    return message


def test_defaults_listen_to_peers_and_bind_api_to_loopback() -> None:
    config = load()
    assert config.listen == ("/ip4/0.0.0.0/tcp/4001", "/ip6/::/tcp/4001")
    assert (config.api_host, config.api_port, config.api_key) == ("127.0.0.1", 8642, None)
    assert (config.data_dir, config.cache_dir) == (default_data_dir(), default_cache_dir())
    assert (config.serve, config.swarm_key, config.memory_bytes, config.no_catalogue) == ((), None, None, False)
    assert config.bootstrap == ()
    assert config.mdns
    assert not load({"METASWARM_NO_MDNS": "true"}).mdns
    assert load({"METASWARM_NO_MDNS": "0"}).mdns


def test_precedence_is_flag_environment_file(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('threads = 1\nmemory = "1GiB"\nlog_level = "error"\n')
    environ = {"METASWARM_THREADS": "2", "METASWARM_MEMORY": "2GiB", "METASWARM_CONFIG": str(file)}
    config = load(environ, threads="3")
    assert (config.threads, config.memory_bytes, config.log_level) == (3, 2 << 30, "error")


def test_reads_every_option_from_environment_and_from_file(tmp_path: Path) -> None:
    key = tmp_path / "swarm.key"
    key.write_text("AB" * 32 + "\n")
    keys = tmp_path / "api.keys"
    keys.write_text(f"# ours\none {'AB' * 32} requests_per_minute=60 concurrency=4\n\ntwo {'cd' * 32}  # no limits\n")
    environ = {
        "METASWARM_DATA_DIR": "/data",
        "METASWARM_CACHE_DIR": "/cache",
        "METASWARM_CACHE_LIMIT": "20GiB",
        "METASWARM_LISTEN": "/ip4/127.0.0.1/tcp/1, /ip6/::1/tcp/2",
        "METASWARM_ANNOUNCE": "/ip4/203.0.113.7/tcp/3,/dns4/node.example/tcp/4",
        "METASWARM_NO_PORT_MAPPING": "1",
        "METASWARM_NO_RELAY": "1",
        "METASWARM_RELAY_RATE": "4MiB",
        "METASWARM_API": "[::1]:0",
        "METASWARM_API_KEY": "sesame\n",
        "METASWARM_API_KEYS": str(keys),
        "METASWARM_CORS_ORIGIN": "https://example.org",
        "METASWARM_BOOTSTRAP": f"{ADDRESS},{OTHER_ADDRESS}",
        "METASWARM_SERVE": "tiny:0-4,other",
        "METASWARM_DRAFT": "small",
        "METASWARM_SWARM_KEY": str(key),
        "METASWARM_MEMORY": "512MiB",
        "METASWARM_NO_CATALOGUE": "1",
        "METASWARM_NO_MDNS": "0",
        "METASWARM_THREADS": "2",
        "METASWARM_DEVICE": "cuda:1",
        "METASWARM_BATCHING": "one",
        "METASWARM_EPOCH": "30",
        "METASWARM_CHECKPOINT": "cd" * 32,
        "METASWARM_EXPLORATION": "0.25",
        "METASWARM_PRICE": "2.5",
        "METASWARM_LOG_LEVEL": "DEBUG",
        "METASWARM_LOG_FORMAT": "json",
    }
    assert environ.keys() == {f"METASWARM_{option.name.upper()}" for option in NODE_OPTIONS if option.expose_value}
    expected = NodeConfig(
        data_dir=Path("/data"),
        cache_dir=Path("/cache"),
        listen=("/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/2"),
        announce=("/ip4/203.0.113.7/tcp/3", "/dns4/node.example/tcp/4"),
        port_mapping=False,
        relay=False,
        relay_bytes_per_s=4 << 20,
        api_host="::1",
        api_port=0,
        api_key="sesame",
        api_keys=(
            ApiKey(name="one", sha256="ab" * 32, requests_per_minute=60, concurrency=4),
            ApiKey(name="two", sha256="cd" * 32),
        ),
        cors_origins=("https://example.org",),
        bootstrap=(ADDRESS, OTHER_ADDRESS),
        serve=(ServeSpec("tiny", BlockRange(0, 4)), ServeSpec("other")),
        draft="small",
        swarm_key="ab" * 32,
        memory_bytes=512 << 20,
        cache_limit_bytes=20 << 30,
        no_catalogue=True,
        mdns=True,
        threads=2,
        device="cuda:1",
        batching="one",
        epoch_s=30.0,
        checkpoints=(b"\xcd" * 32,),
        exploration=0.25,
        price=2.5,
        log_level="debug",
        log_format="json",
    )
    assert load(environ) == expected
    file = tmp_path / "node.toml"
    file.write_text(
        f"""
        data_dir = "/data"
        cache_dir = "/cache"
        cache_limit = "20GiB"
        listen = ["/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/2"]
        announce = ["/ip4/203.0.113.7/tcp/3", "/dns4/node.example/tcp/4"]
        no_port_mapping = true
        no_relay = true
        relay_rate = "4MiB"
        api = "[::1]:0"
        api_key = "sesame"
        api_keys = "api.keys"
        cors_origin = ["https://example.org"]
        bootstrap = ["{ADDRESS}", "{OTHER_ADDRESS}"]
        serve = ["tiny:0-4", "other"]
        draft = "small"
        swarm_key = "swarm.key"
        memory = 536870912
        no_catalogue = true
        no_mdns = false
        threads = 2
        device = "cuda:1"
        batching = "one"
        epoch = 30
        checkpoint = ["{"cd" * 32}"]
        exploration = 0.25
        price = 2.5
        log_level = "debug"
        log_format = "json"
        """
    )
    assert load(config=str(file)) == expected


def test_relative_path_in_file_starts_at_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('data_dir = "mine"')
    assert load(config=str(file)).data_dir == tmp_path / "mine"
    assert load(data_dir="mine").data_dir == Path.cwd() / "mine"
    assert load(data_dir="~/mine").data_dir == Path.home() / "mine"


def test_names_unknown_option_in_file(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('liston = "/ip4/127.0.0.1/tcp/1"')
    said = fault(config=str(file))
    assert f"{file}, line 1: unknown option 'liston'; did you mean 'listen'?" in said
    assert "the options are" not in said
    file.write_text("workers = 2")
    assert "unknown option 'workers'; the options are data_dir, " in fault(config=str(file))


def test_names_line_of_malformed_file(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("threads = 1\nmemory = \n")
    assert str(file) in fault(config=str(file))
    assert "line 2" in fault(config=str(file))
    assert "cannot be read" in fault(config=str(tmp_path / "none.toml"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "swarm.example.org"])
def test_refuses_reachable_api_without_key(host: str) -> None:
    api = f"[{host}]:80" if ":" in host else f"{host}:80"
    assert "API key" in fault(api=api)
    assert load(api=api, api_key="sesame").api_host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_loopback_api_needs_no_key(host: str) -> None:
    api = f"[{host}]:80" if ":" in host else f"{host}:80"
    assert load(api=api).api_host == host


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4GiB", 4 << 30),
        ("4gib", 4 << 30),
        ("512 MiB", 512 << 20),
        ("1.5KiB", 1536),
        ("2GB", 2 * 10**9),
        ("1000", 1000),
        ("1000B", 1000),
    ],
)
def test_parses_memory_with_and_without_unit(text: str, count: int) -> None:
    assert load(memory=text).memory_bytes == count


@pytest.mark.parametrize("text", ["auto", "all", "cpu", "mps", "cuda", "cuda:3", "cuda:0,cuda:2"])
def test_takes_one_device_or_several(text: str) -> None:
    assert load(device=text).device == text


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("memory", "lots", "--memory"),
        ("memory", "-1", "--memory"),
        ("memory", "0", "--memory"),
        ("memory", "4 apples", "--memory"),
        ("threads", "0", "--threads"),
        ("threads", "many", "--threads"),
        ("device", "gpu", "--device: expected auto, all, cpu"),
        ("device", "cuda,cpu", "--device: expected auto, all, cpu"),
        ("device", "cuda:1,cuda:1", "--device: each GPU once"),
        ("batching", "some", "Invalid value for --batching"),
        ("epoch", "1", "--epoch"),
        ("epoch", "soon", "--epoch"),
        ("checkpoint", ["cd"], "--checkpoint"),
        ("exploration", "1.5", "--exploration"),
        ("exploration", "a lot", "--exploration"),
        ("exploration", ".", "--exploration"),
        ("log_level", "loud", "--log-level"),
        ("api", "8642", "--api: expected HOST:PORT"),
        ("api", "http://127.0.0.1:8642", "--api: expected HOST:PORT"),
        ("api", "127.0.0.1:99999", "--api: expected HOST:PORT"),
        ("api_key", "open sesame", "--api-key"),
        ("api_key", " ", "--api-key"),
        ("listen", ["4001"], "'4001'"),
        ("listen", ["/ip4/300.0.0.1/tcp/1"], "'300.0.0.1'"),
        ("listen", ["/ip4/127.0.0.1/tcp/x"], "/tcp/x"),
        ("listen", [ADDRESS], "--listen"),
        ("listen", ["/ip4/127.0.0.1/udp/1/quic-v1"], "--listen"),
        ("bootstrap", ["/ip4/203.0.113.7/tcp/4001"], "expected the address of a peer"),
        ("bootstrap", ["/ip4/203.0.113.7/tcp/4001/p2p/Qm"], "'Qm'"),
        ("bootstrap", [f"/ip4/203.0.113/tcp/4001/p2p/{PEER}"], "/ip4/203.0.113/tcp"),
        ("bootstrap", ["none.yaml"], "none.yaml cannot be read"),
        ("serve", ["tiny:5"], "'5'"),
        ("serve", ["owner/tiny:Q4_K_M"], "is a source: `metaswarm model import owner/tiny:Q4_K_M` first"),
        ("serve", ["./m.gguf"], "is a source: `metaswarm model import ./m.gguf` first"),
        ("draft", "small", "small would never be used"),
        ("serve", ["tiny:5-5"], "5-5"),
        ("serve", ["tiny:"], "'"),
        ("serve", [":0-5"], "expected MODEL or MODEL:START-END"),
        ("serve", ["tiny"] * 49, "49 spans; a node serves at most 48"),
        ("swarm_key", "none.key", "none.key cannot be read"),
    ],
)
def test_wrong_value_is_one_line_that_names_option(option: str, value: str | list[str], says: str) -> None:
    assert says in fault({}, **{option: value})


@pytest.mark.parametrize(
    "line",
    ["data_dir = 5", "cache_dir = true", "draft = ['x']", "api_key = 12345", "serve = [1]", "serve = 1979-05-27"],
)
def test_file_must_have_text_where_option_is_text(tmp_path: Path, line: str) -> None:
    file = tmp_path / "node.toml"
    file.write_text(line)
    assert f"{line.split()[0]} in {file}, line 1: expected a text, not" in fault(config=str(file))


def test_epoch_is_float_from_everywhere() -> None:
    assert {type(load().epoch_s), type(load(epoch="600").epoch_s)} == {float}


@pytest.mark.parametrize("content", ["", "ab" * 31, "zz" * 32, "ab" * 33])
def test_refuses_malformed_swarm_key(tmp_path: Path, content: str) -> None:
    file = tmp_path / "swarm.key"
    file.write_text(content)
    assert "is not a swarm key" in fault(swarm_key=str(file))


def test_repr_hides_secrets(tmp_path: Path) -> None:
    file = tmp_path / "swarm.key"
    file.write_text("ab" * 32)
    config = load(api_key="sesame", swarm_key=str(file))
    assert "sesame" not in repr(config)
    assert "abab" not in repr(config)


class TestBootstrapFile:
    def load(self, tmp_path: Path, text: str) -> tuple[str, ...]:
        (tmp_path / "peers.yaml").write_text(text)
        return load(bootstrap=[str(tmp_path / "peers.yaml")]).bootstrap

    def fault(self, tmp_path: Path, text: str) -> str:
        (tmp_path / "peers.yaml").write_text(text)
        return fault(bootstrap=[str(tmp_path / "peers.yaml")])

    def test_mixes_files_and_addresses(self, tmp_path: Path) -> None:
        assert self.load(tmp_path, f"peers:\n  - {ADDRESS}\n  - {OTHER_ADDRESS}\n") == (ADDRESS, OTHER_ADDRESS)
        (tmp_path / "peers.yaml").write_text(f"peers: [{ADDRESS}]")
        mixed = load(bootstrap=[OTHER_ADDRESS, str(tmp_path / "peers.yaml"), ADDRESS])
        assert mixed.bootstrap == (OTHER_ADDRESS, ADDRESS)

    def test_empty_list_replaces_shipped_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "bootstrap_peers.yaml").write_text(f"peers: [{ADDRESS}]")
        monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
        (tmp_path / "node.toml").write_text("bootstrap = []")
        assert load().bootstrap == (ADDRESS,)
        assert load(config=str(tmp_path / "node.toml")).bootstrap == ()

    @pytest.mark.parametrize("text", ["peers: []", "peers:", "peers:\n  # - one\n"])
    def test_may_be_empty(self, tmp_path: Path, text: str) -> None:
        assert self.load(tmp_path, text) == ()

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            (f"peers:\n  - {ADDRESS}\n  - [\n", 4),
            ("peers:\n\t- x\n", 2),
            (f"peers:\n  - {ADDRESS}\n  - /ip4/203.0.113.7/tcp/4001\n", 3),
            (f"peers:\n  - {ADDRESS}\n  - peer: {ADDRESS}\n", 3),
            (f"peers: [{ADDRESS}]\nfriends: []\n", 2),
            ("peers:\n  one: two\n", 2),
            (f"- {ADDRESS}\n", 1),
            ("", 1),
        ],
    )
    def test_names_line_of_fault(self, tmp_path: Path, text: str, line: int) -> None:
        assert f"{tmp_path / 'peers.yaml'}, line {line}:" in self.fault(tmp_path, text)

    def test_does_not_expand_aliases(self, tmp_path: Path) -> None:
        lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 64)]
        assert "line 1: expected `peers:`" in self.fault(tmp_path, "\n".join(lines))

    @pytest.mark.parametrize("place", ["node/bootstrap_peers.yaml", "bootstrap_peers.yaml"])
    def test_finds_shipped_file_in_wheel_and_checkout(
        self, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "node").mkdir()
        (tmp_path / place).write_text(f"peers: [{ADDRESS}]")
        monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / package)
        assert load().bootstrap == (ADDRESS,)
        assert load(bootstrap=[OTHER_ADDRESS]).bootstrap == (OTHER_ADDRESS,)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("METASWARM_MEMROY", "METASWARM_MEMORY"),
        ("METASWARM_DATADIR", "METASWARM_DATA_DIR"),
        ("METASWARM_APIKEY", "METASWARM_API_KEY"),
        ("METASWARM_CONFG", "METASWARM_CONFIG"),
        ("METASWARM_QWERTZ", None),
    ],
)
def test_suggests_name_for_misspelt_variable(name: str, meant: str | None) -> None:
    suggestion = f"; did you mean {meant!r}?" if meant else ""
    with mock.patch.dict(os.environ, {name: "1"}), pytest.raises(click.UsageError) as caught:
        refuse_unknown_variables()
    assert caught.value.message == f"unknown environment variable {name!r}{suggestion}"


def test_ignores_foreign_empty_and_test_variables() -> None:
    ignored = {"METASWARMS": "1", "METASWARM": "1", "METASWARM_MEMROY": "", "METASWARM_REQUIRE_ALL": "1"}
    with mock.patch.dict(os.environ, ignored):
        refuse_unknown_variables()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("one", "line 2: expected NAME SHA256"),
        ("one sesame", "line 2: expected NAME SHA256"),
        (f"one {'ab' * 32} requests_per_minute=0", "not 'requests_per_minute=0'"),
        (f"one {'ab' * 32} rate=5", "not 'rate=5'"),
        (f"one {'ab' * 32}\ntwo {'AB' * 32}", "two lines have the same key"),
    ],
)
def test_file_of_api_keys_names_faulty_line(tmp_path: Path, line: str, expected: str) -> None:
    file = tmp_path / "api.keys"
    file.write_text(f"# keys\n{line}\n")
    assert expected in fault(api_keys=str(file))


@pytest.mark.parametrize("text", ["", "# keys\n\n"])
def test_file_without_api_key_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "api.keys"
    file.write_text(text)
    assert f"{file} has no API key: add one with `metaswarm keygen" in fault(api_keys=str(file))


@pytest.mark.parametrize(
    "origin", ["example.org", "null", "file:///page", "https://example.org/page", "https://example.org/"]
)
def test_refuses_what_is_not_an_origin(origin: str) -> None:
    assert "expected an origin" in fault(cors_origin=origin)


@pytest.mark.parametrize("origin", ["app://obsidian.md", "chrome-extension://abc", "http://localhost:3000", "file://"])
def test_takes_origins_of_programs(origin: str) -> None:
    assert load(cors_origin=origin).cors_origins == (origin,)


def test_api_for_every_web_page_requires_a_key() -> None:
    assert "opens the API to every web page" in fault(cors_origin="*")
    assert load(cors_origin="*", api_key="sesame").cors_origins == ("*",)
