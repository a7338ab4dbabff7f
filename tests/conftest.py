"""Flags of the tests."""


def pytest_addoption(parser):
    """--device-all."""
    parser.addoption(
        "--device-all", action="store_true", help="every script on the pretended device, not three"
    )
