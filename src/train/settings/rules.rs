//! Rules that a value keeps, or a problem to report.

pub(super) fn check(problems: &mut Vec<String>, holds: bool, problem: impl FnOnce() -> String) {
    if !holds {
        problems.push(problem());
    }
}

pub(super) fn nonzero(problems: &mut Vec<String>, key: &str, value: Option<usize>) {
    check(problems, value != Some(0), || format!("`{key}` must be at least 1, got 0"));
}

pub(super) fn positive(problems: &mut Vec<String>, key: &str, value: f64) {
    check(problems, value.is_finite() && value > 0.0, || format!("`{key}` must be above 0, got {value}"));
}

pub(super) fn not_negative(problems: &mut Vec<String>, key: &str, value: f64) {
    check(problems, value.is_finite() && value >= 0.0, || format!("`{key}` must be 0 or more, got {value}"));
}

pub(super) fn below_one(problems: &mut Vec<String>, key: &str, value: f64) {
    check(problems, (0.0..1.0).contains(&value), || format!("`{key}` must be at least 0 and below 1, got {value}"));
}
