"""Conformance suite for quantizers, built in or from a plugin.

    from qconvert.testing import parametrize_with_checks

    @parametrize_with_checks([MyQuantizer()])
    def test_conforms(quantizer, check):
        check(quantizer)

Without pytest: `check_quantizer(MyQuantizer())`.
"""

from qconvert.testing.failure import CheckFailure
from qconvert.testing.suite import Check, CheckResult, check_quantizer, checks, parametrize_with_checks

__all__ = ["Check", "CheckFailure", "CheckResult", "check_quantizer", "checks", "parametrize_with_checks"]
