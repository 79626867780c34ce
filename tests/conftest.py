"""What holds for every test: only loopback as network, no caches of the machine."""

import importlib.metadata
import os
import socket
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.secrets_that_repeat import repeat_secrets

# Set before transformers is imported: it reads them once.
_caches = tempfile.TemporaryDirectory(prefix="dpzoo-tests-")
os.environ["HF_HOME"] = _caches.name
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
    os.environ.pop(_name, None)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores; the tests' models are tiny

hypothesis.settings.register_profile(
    "dpzoo",
    deadline=None,  # the first example pays for compilation and imports
    derandomize=True,  # a run says the same thing twice
    database=None,
)
hypothesis.settings.register_profile("fuzz", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fuzz" if "DPZOO_FUZZ" in os.environ else "dpzoo")

LOOPBACK = ("127.", "::1", "localhost")


def pytest_report_header() -> str:
    names = ("torch", "opacus", "transformers", "safetensors")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuse every connection that leaves the machine, naming the address."""
    connect = socket.socket.connect
    getaddrinfo = socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else None
        if host is not None and not str(host).startswith(LOOPBACK):
            raise OSError(f"the tests may not use the network, and one connects to {address!r}")
        connect(self, address)

    def guarded_getaddrinfo(host: object, *args: object, **kwargs: object) -> object:
        name = host.decode() if isinstance(host, bytes) else host
        if name and not str(name).startswith((*LOOPBACK, "0.0.0.0", socket.gethostname())):
            raise OSError(f"the tests may not use the network, and one looks up {host!r}")
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts from the same state of torch's generator, whatever ran before it.

    Its secrets (the keys of the noise among them) follow from its name: a test of noise repeats.
    """
    torch.manual_seed(0)
    repeat_secrets(request.node.nodeid, monkeypatch.setattr)


@pytest.fixture(autouse=True)
def draws_by_torchs_seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that repeat: engines draw their rows from torch's generator, which `seed` has set."""
    if request.node.get_closest_marker("secret_draws") is None:
        monkeypatch.setattr("dpzoo.clipping.engine.secret_generator", lambda: None)


@pytest.fixture
def quiet() -> Iterator[None]:
    """transformers says nothing of new parameters, tiny configs and training."""
    import transformers  # after the environment is set

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)
