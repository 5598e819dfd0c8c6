"""Conformance suite for quantizers, built in or from a plugin.

    from qconvert.testing import parametrize_with_checks

    @parametrize_with_checks([MyQuantizer()])
    def test_conforms(quantizer, check):
        check(quantizer)

Without pytest: `check_quantizer(MyQuantizer())`.

`plugin_manager()` holds the plugins of this environment and asks them as a run does: `quantizer(name, options)`,
`load_model(source)`, `find_data(source)`, `conversion_finished(recipe, report)`.
"""

from qconvert.plugin.host.manager import plugin_manager
from qconvert.testing.failure import CheckFailure
from qconvert.testing.suite import Check, CheckResult, check_quantizer, checks, parametrize_with_checks

__all__ = ["Check", "CheckFailure", "CheckResult", "check_quantizer", "checks", "parametrize_with_checks", "plugin_manager"]
