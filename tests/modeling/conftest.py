import logging

import pytest
from transformers.utils import logging as transformers_logging


@pytest.fixture
def warnings_of(caplog):
    """A function that returns what the library has logged in this test so far."""
    transformers_logging.enable_propagation()
    logging.getLogger("dart_hf").setLevel(logging.WARNING)
    yield lambda: [record.getMessage() for record in caplog.records if record.name.startswith("dart_hf")]
    transformers_logging.disable_propagation()
