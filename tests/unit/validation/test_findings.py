from lora_hub.validation.findings import MOST, fewer, finding


def many(rule, count):
    return [finding(rule, f"adapter/{number}", "so") for number in range(count)]


def test_findings_up_to_the_limit_stay_as_they_are():
    found = [*many("LH030", MOST), *many("LH031", MOST)]

    assert fewer(found, "adapter") == found


def test_of_a_flood_the_first_are_listed_and_the_others_counted():
    found = [*many("LH030", MOST + 7), *many("LH031", 2), *many("LH012", MOST + 1)]

    kept = fewer(found, "adapter")

    assert kept[: MOST + 2] == [*found[:MOST], *many("LH031", 2)]
    assert [(one.rule, one.severity, one.where, one.message) for one in kept[-2:]] == [
        ("LH030", "error", "adapter", "and 7 more of this rule are not listed"),
        ("LH012", "error", "adapter", "and 1 more of this rule are not listed"),
    ]
