from moshi_ttt.testing import conformance_tests

test_delta_rule = conformance_tests("delta_rule", {"lr": 0.5}, {"lr": 0.1, "gate": 0.2})
