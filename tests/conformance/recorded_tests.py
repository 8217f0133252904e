"""The transformers version with which we have gone through every common test, and the names of these tests.

With this version the harness is strict: every test exercises our classes or is listed as an exception. Other versions
have other tests, and these must not break anybody's test run (see `harness.judge_other_version`).

After an update of transformers in constraints.txt, write the list again and look at what changed:

    cd tests && HF_HUB_OFFLINE=1 ../.venv/bin/python -m conformance.recorded_tests && git diff conformance
"""

from pathlib import Path

FILE = Path(__file__).with_name("recorded_tests.txt")
VERSION, *NAMES = FILE.read_text().splitlines()

if __name__ == "__main__":
    import transformers

    from .harness import names_of_tests
    from .suites import load_suites
    from .testers import DART, build_test_cases

    FILE.write_text(
        "\n".join([transformers.__version__, *names_of_tests(build_test_cases(DART, load_suites()))]) + "\n"
    )
