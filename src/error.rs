//! `Error`: every failure that a user can fix, each with the line that says what to do about it.
//!
//! The message says what is wrong and where (file, line, field); the hint says what to type. `cli` prints them as two
//! lines and picks the exit code. Failures inside tensor code are `candle_core::Error`, not these.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Once;

/// A failure that a user can fix.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line or a recipe asks for something that does not exist or does not fit together (exit code 2).
    #[error("{message}")]
    Usage {
        /// What is wrong, naming the flag or key.
        message: String,
        /// What to do about it.
        hint: String,
    },
    /// A file or folder that is needed is not there.
    #[error("{what} not found: `{}`", path.display())]
    Missing {
        /// What the file is for.
        what: String,
        /// Where it was expected.
        path: PathBuf,
        /// What to do about it.
        hint: String,
    },
    /// A file's content is broken or is not what its format promises.
    #[error("`{}`: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, naming the line or field.
        problem: String,
        /// What to do about it.
        hint: String,
    },
    /// A valid request that this program cannot do right, and therefore does not do at all.
    #[error("not supported: {what}")]
    Unsupported {
        /// What was asked, naming the field and value.
        what: String,
        /// What to do about it.
        hint: String,
    },
    /// Parts that do not belong together, with every problem found.
    #[error("{what}: {}", problems.join("; "))]
    Mismatch {
        /// Which parts.
        what: String,
        /// All problems, not only the first.
        problems: Vec<String>,
        /// What to do about it.
        hint: String,
    },
    /// A run that would do nothing useful, or would destroy something.
    #[error("{message}")]
    Refused {
        /// Why it is refused.
        message: String,
        /// What to do about it.
        hint: String,
    },
    /// The operating system refused.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried: `read`, `write`, `create`.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Result of everything that a user can make fail.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What to do about it, as one line; `None` where the message says it all.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Usage { hint, .. }
            | Self::Missing { hint, .. }
            | Self::Invalid { hint, .. }
            | Self::Unsupported { hint, .. }
            | Self::Mismatch { hint, .. }
            | Self::Refused { hint, .. } => (!hint.is_empty()).then(|| hint.clone()),
            Self::Io { source, .. } => io_hint(source).map(str::to_owned),
        }
    }

    /// An I/O failure with what was tried on which path; made for `map_err`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// Broken content of `path`.
    pub fn invalid(path: &Path, problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Invalid { path: path.to_owned(), problem: problem.into(), hint: hint.into() }
    }

    /// A request that is valid but cannot be done right.
    pub fn unsupported(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into(), hint: hint.into() }
    }

    /// A wrong command line or recipe.
    pub fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), hint: hint.into() }
    }

    /// The same, said of `place`, such as a row of a file.
    #[must_use]
    pub fn at(self, place: &str) -> Self {
        let placed = |text: String| format!("{place}: {text}");
        match self {
            Self::Unsupported { what, hint } => Self::Unsupported { what: placed(what), hint },
            Self::Refused { message, hint } => Self::Refused { message: placed(message), hint },
            other => other,
        }
    }

    /// A run that is refused.
    pub fn refused(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Refused { message: message.into(), hint: hint.into() }
    }
}

fn io_hint(source: &std::io::Error) -> Option<&'static str> {
    use std::io::ErrorKind::{
        FileTooLarge, NotADirectory, NotFound, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull,
    };
    match source.kind() {
        StorageFull | QuotaExceeded => {
            Some("free some space on that disk or choose another folder with --out_dir; nothing was half written")
        }
        FileTooLarge => Some("raise the limit of file sizes (`ulimit -f`); nothing was half written"),
        PermissionDenied | ReadOnlyFilesystem => Some("choose a folder that you may write to"),
        NotFound => Some("check the path"),
        NotADirectory => Some("a part of that path is a file, not a folder"),
        _ => None,
    }
}

/// The candidate most like `name`, if any is like it.
#[must_use]
pub fn closest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let name = name.to_lowercase();
    let limit = (name.chars().count() / 3).max(1);
    candidates
        .map(|candidate| (edit_distance(&name, &candidate.to_lowercase()), candidate))
        .filter(|(distance, _)| !name.is_empty() && *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Edit distance in characters: insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`.
#[must_use]
pub fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    let mut before = Vec::new();
    for i in 0..a.len() {
        let mut next = vec![i + 1];
        for j in 0..b.len() {
            let replaced = row[j] + usize::from(a[i] != b[j]);
            let swaps = i > 0 && j > 0 && a[i] == b[j - 1] && a[i - 1] == b[j];
            let swapped = if swaps { before[j - 1] + 1 } else { replaced };
            next.push(replaced.min(swapped).min(row[j + 1] + 1).min(next[j] + 1));
        }
        before = std::mem::replace(&mut row, next);
    }
    row[b.len()]
}

/// What `read` gives, or `None` where it panics, which then says nothing: a library's panic over a file is the file's
/// mistake.
pub fn quietly<T>(read: impl FnOnce() -> T) -> Option<T> {
    thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                usual(panic);
            }
        }));
    });
    QUIET.set(true);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read));
    QUIET.set(false);
    result.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distances() {
        for (a, b, apart) in
            [("", "abc", 3), ("kitten", "sitting", 3), ("cdua", "cuda", 1), ("abc", "cab", 2), ("a", "a", 0)]
        {
            assert_eq!((edit_distance(a, b), edit_distance(b, a)), (apart, apart), "{a} {b}");
        }
        assert_eq!(closest("phi4", ["phi-4", "phi-4-mini"].into_iter()), Some("phi-4"));
        assert_eq!(closest("", ["a"].into_iter()), None);
    }
}
