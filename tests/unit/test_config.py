from collections.abc import Mapping
from pathlib import Path

import pytest

from node.config import (
    OPTIONS,
    ConfigError,
    NodeConfig,
    NodeReady,
    ServeSpec,
    default_cache_dir,
    default_data_dir,
    load_config,
)
from protocol.identity import BlockRange, peer_id_from_public_key

PEER = peer_id_from_public_key(bytes(32))
ADDRESS = f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER}"
OTHER_ADDRESS = f"/dns4/swarm.example.org/tcp/4001/p2p/{PEER}"


def load(environ: Mapping[str, str] | None = None, **flags: object) -> NodeConfig:
    return load_config(flags, environ or {})


def fault(environ: Mapping[str, str] | None = None, **flags: object) -> str:
    """The one line that a wrong configuration gives."""
    with pytest.raises(ConfigError) as caught:
        load(environ, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_any_option_a_node_is_open_to_peers_and_its_api_closed_to_others() -> None:
    config = load()
    assert config.listen == ("/ip4/0.0.0.0/tcp/4001",)
    assert (config.api_host, config.api_port, config.api_key) == ("127.0.0.1", 8642, None)
    assert (config.data_dir, config.cache_dir) == (default_data_dir(), default_cache_dir())
    assert (config.serve, config.swarm_key, config.memory_bytes, config.no_catalogue) == ((), None, None, False)
    assert config.bootstrap == ()
    assert config.mdns
    assert not load(no_mdns="true").mdns


def test_a_flag_prevails_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('threads = 1\nmemory = "1GiB"\nlog_level = "error"\n')
    environ = {"METASWARM_THREADS": "2", "METASWARM_MEMORY": "2GiB", "METASWARM_CONFIG": str(file)}
    config = load(environ, threads="3")
    assert (config.threads, config.memory_bytes, config.log_level) == (3, 2 << 30, "error")


def test_every_option_can_stand_in_the_file_and_in_the_environment(tmp_path: Path) -> None:
    key = tmp_path / "swarm.key"
    key.write_text("AB" * 32 + "\n")
    environ = {
        "METASWARM_DATA_DIR": "/data",
        "METASWARM_CACHE_DIR": "/cache",
        "METASWARM_CACHE_LIMIT": "20GiB",
        "METASWARM_LISTEN": "/ip4/127.0.0.1/tcp/1, /ip6/::1/tcp/2",
        "METASWARM_API": "[::1]:0",
        "METASWARM_API_KEY": "sesame",
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
        "METASWARM_LOG_LEVEL": "DEBUG",
    }
    assert environ.keys() == {f"METASWARM_{name.upper()}" for name in OPTIONS}
    expected = NodeConfig(
        data_dir=Path("/data"),
        cache_dir=Path("/cache"),
        listen=("/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/2"),
        api_host="::1",
        api_port=0,
        api_key="sesame",
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
        log_level="debug",
    )
    assert load(environ) == expected
    file = tmp_path / "node.toml"
    file.write_text(
        f"""
        data_dir = "/data"
        cache_dir = "/cache"
        cache_limit = "20GiB"
        listen = ["/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/2"]
        api = "[::1]:0"
        api_key = "sesame"
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
        log_level = "debug"
        """
    )
    assert load(config=str(file)) == expected


def test_paths_in_the_file_start_where_the_file_is_and_others_where_the_user_is(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('data_dir = "mine"')
    assert load(config=str(file)).data_dir == tmp_path / "mine"
    assert load(data_dir="mine").data_dir == Path.cwd() / "mine"
    assert load(data_dir="~/mine").data_dir == Path.home() / "mine"


def test_an_unknown_option_in_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('liston = "/ip4/127.0.0.1/tcp/1"')
    assert f"{file}: there is no option 'liston'" in fault(config=str(file))


def test_a_broken_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("threads = 1\nmemory = \n")
    assert str(file) in fault(config=str(file))
    assert "line 2" in fault(config=str(file))
    assert "cannot be read" in fault(config=str(tmp_path / "none.toml"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "swarm.example.org"])
def test_the_api_is_not_opened_to_others_without_a_key(host: str) -> None:
    api = f"[{host}]:80" if ":" in host else f"{host}:80"
    assert "API key" in fault(api=api)
    assert load(api=api, api_key="sesame").api_host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_the_api_of_ones_own_machine_needs_no_key(host: str) -> None:
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
def test_memory_is_bytes_with_or_without_a_unit(text: str, count: int) -> None:
    assert load(memory=text).memory_bytes == count


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("memory", "lots", "--memory"),
        ("memory", "-1", "--memory"),
        ("memory", "0", "--memory"),
        ("memory", "4 apples", "--memory"),
        ("threads", "0", "--threads"),
        ("threads", "many", "--threads"),
        ("batching", "some", "--batching: expected one of one, static, continuous"),
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
        ("listen", ["4001"], "'4001'"),
        ("listen", ["/ip4/300.0.0.1/tcp/1"], "'300.0.0.1' is no ip4 address"),
        ("listen", ["/ip4/127.0.0.1/tcp/x"], "'x' is no port"),
        ("listen", [ADDRESS], "--listen"),
        ("listen", ["/ip4/127.0.0.1/udp/1/quic-v1"], "--listen"),
        ("bootstrap", ["/ip4/203.0.113.7/tcp/4001"], "must end in /p2p/"),
        ("bootstrap", ["/ip4/203.0.113.7/tcp/4001/p2p/Qm"], "no peer id"),
        ("bootstrap", [f"/ip4/203.0.113/tcp/4001/p2p/{PEER}"], "'203.0.113' is no ip4 address"),
        ("bootstrap", ["none.yaml"], "none.yaml cannot be read"),
        ("serve", ["tiny:5"], "'5' is no range of blocks"),
        ("draft", "small", "small would never guess: only who serves a model's first blocks does"),
        ("serve", ["tiny:5-5"], "5-5 is no range of blocks"),
        ("serve", ["tiny:"], "no range of blocks"),
        ("serve", [":0-5"], "names no model"),
        ("serve", ["tiny"] * 49, "49 spans are too many for one node, which serves 48 at most"),
        ("swarm_key", "none.key", "none.key cannot be read"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(option: str, value: object, says: str) -> None:
    assert says in fault({}, **{option: value})


@pytest.mark.parametrize("content", ["", "ab" * 31, "zz" * 32, "ab" * 33])
def test_a_swarm_key_is_64_hexadecimal_digits(tmp_path: Path, content: str) -> None:
    file = tmp_path / "swarm.key"
    file.write_text(content)
    assert "no swarm key" in fault(swarm_key=str(file))


def test_secrets_do_not_show_when_a_configuration_is_printed(tmp_path: Path) -> None:
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

    def test_it_lists_multiaddrs_and_mixes_with_others(self, tmp_path: Path) -> None:
        assert self.load(tmp_path, f"peers:\n  - {ADDRESS}\n  - {OTHER_ADDRESS}\n") == (ADDRESS, OTHER_ADDRESS)
        (tmp_path / "peers.yaml").write_text(f"peers: [{ADDRESS}]")
        mixed = load(bootstrap=[OTHER_ADDRESS, str(tmp_path / "peers.yaml"), ADDRESS])
        assert mixed.bootstrap == (OTHER_ADDRESS, ADDRESS)

    @pytest.mark.parametrize("text", ["peers: []", "peers:", "peers:\n  # - one\n"])
    def test_it_may_be_empty(self, tmp_path: Path, text: str) -> None:
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
    def test_a_fault_in_it_is_named_with_its_line(self, tmp_path: Path, text: str, line: int) -> None:
        assert f"{tmp_path / 'peers.yaml'}, line {line}:" in self.fault(tmp_path, text)

    def test_an_explosion_of_aliases_is_not_expanded(self, tmp_path: Path) -> None:
        lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 64)]
        assert "line 1: expected `peers:`" in self.fault(tmp_path, "\n".join(lines))

    @pytest.mark.parametrize("place", ["node/bootstrap_peers.yaml", "bootstrap_peers.yaml"])
    def test_the_one_that_ships_is_found_in_a_wheel_and_in_a_checkout(
        self, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "node").mkdir()
        (tmp_path / place).write_text(f"peers: [{ADDRESS}]")
        monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / package)
        assert load().bootstrap == (ADDRESS,)
        assert load(bootstrap=[OTHER_ADDRESS]).bootstrap == (OTHER_ADDRESS,)


class TestReadyFile:
    ready = NodeReady(peer_id=PEER, multiaddrs=(ADDRESS,), api_url="http://127.0.0.1:8642", pid=17)

    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        self.ready.write(tmp_path)
        assert NodeReady.read(tmp_path) == self.ready
        assert [path.name for path in tmp_path.iterdir()] == ["node.json"]

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"peer_id": 7}', "\x00", None])
    def test_what_is_of_no_use_is_as_good_as_absent(self, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / "node.json").write_text(content)
        assert NodeReady.read(tmp_path) is None


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
def test_a_misspelt_variable_is_an_error_that_names_the_right_one(name: str, meant: str | None) -> None:
    suggestion = f"; did you mean {meant!r}?" if meant else ""
    assert fault({name: "1"}) == f"unknown environment variable {name!r}{suggestion}"


def test_variables_of_others_empty_ones_and_those_of_the_tests_are_none_of_our_business() -> None:
    load({"METASWARMS": "1", "METASWARM": "1", "METASWARM_MEMROY": "", "METASWARM_REQUIRE_ALL": "1"})
