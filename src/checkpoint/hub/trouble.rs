//! What goes wrong with a request, and how a user reads it.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::Repo;

use super::answer::{Answer, origin};
use super::{Hub, models};
use crate::error::{Error, edit_distance};

/// What went wrong with one request.
pub(super) enum Trouble {
    /// No connection came about: which and why.
    Unreachable(String),
    /// It may work the next time.
    Broken {
        why: String,
        /// The pause that the server asks for.
        after: Option<Duration>,
    },
    /// It will not work the next time either.
    Fatal(Error),
}

impl Trouble {
    pub(super) fn broken(why: impl Into<String>) -> Self {
        Self::Broken { why: why.into(), after: None }
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Fatal(error)
    }
}

pub(super) fn trouble_of(url: &str, error: ureq::Error) -> Trouble {
    use ureq::Timeout;
    let host = origin(url);
    match error {
        ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => Trouble::Fatal(Error::usage(
            format!("cannot ask `{host}`: {error}"),
            "check HF_ENDPOINT, HTTPS_PROXY and the address",
        )),
        ureq::Error::Io(error) if is_midway(&error) => {
            Trouble::broken(format!("connection to `{host}` broke: {error}"))
        }
        ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect)
        | ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::ConnectProxyFailed(_)
        | ureq::Error::Tls(_)
        | ureq::Error::Rustls(_)
        | ureq::Error::Io(_) => Trouble::Unreachable(format!("no connection to `{host}`: {error}")),
        error => Trouble::broken(format!("connection to `{host}` broke: {error}")),
    }
}

/// Whether the system's word means that a connection was there and ended.
fn is_midway(error: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, Interrupted, TimedOut, UnexpectedEof};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionAborted | ConnectionReset | Interrupted | TimedOut | UnexpectedEof | ErrorKind::Other
    )
}

/// What is being brought, for the messages.
pub(super) enum Errand<'a> {
    Repo {
        repo: &'a Repo,
        repo_id: &'a str,
        dir: &'a Path,
    },
    /// `to` is where the file goes, if it is kept.
    Url {
        url: &'a str,
        to: Option<&'a Path>,
    },
}

impl Errand<'_> {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Repo { repo_id, .. } => repo_id,
            Self::Url { url, .. } => url,
        }
    }

    pub(super) fn unreachable(&self, hub: &Hub, why: &str) -> Error {
        let by_hand = match self {
            Self::Repo { repo, dir, .. } if is_dataset(repo) => {
                format!("put its files for training (.parquet, .jsonl, .json or .csv) by hand into `{}`", dir.display())
            }
            Self::Repo { dir, .. } => {
                format!("put config.json, tokenizer.json and *.safetensors by hand into `{}`", dir.display())
            }
            Self::Url { to: Some(to), .. } => format!("put the file by hand at `{}`", to.display()),
            Self::Url { to: None, .. } => {
                "bring the file by other means and name it in place of the address".to_owned()
            }
        };
        let hint = match self {
            _ if hub.offline => format!("unset HF_HUB_OFFLINE, or {by_hand}"),
            Self::Repo { .. } => format!("check the network; name a mirror with HF_ENDPOINT=https://..., or {by_hand}"),
            Self::Url { .. } => format!("check the network, or {by_hand}"),
        };
        Error::refused(format!("cannot download `{}`: {why}", self.name()), hint)
    }

    pub(super) fn gave_up(&self, why: &str) -> Error {
        let hint = if why.contains("429") {
            "wait some minutes and run the same command again; requests with --access_token or HF_TOKEN may come oftener"
        } else {
            "run the same command again: it goes on where it stopped"
        };
        Error::refused(format!("cannot download `{}`: {why}", self.name()), hint)
    }

    /// Why an answer that is not the file is not the file.
    pub(super) fn refusal(&self, hub: &Hub, answer: &Answer) -> Trouble {
        let status = answer.status();
        let from = origin(&hub.endpoint);
        match status {
            429 => Trouble::Broken { why: "too many requests (429)".to_owned(), after: answer.retry_after() },
            408 | 500..=599 => {
                Trouble::Broken { why: format!("the server fails ({status})"), after: answer.retry_after() }
            }
            // The CDN's addresses are signed and expire; the next try gets a new one.
            401 | 403 if !answer.at_home && matches!(self, Self::Repo { .. }) => {
                Trouble::broken(format!("the file server refuses ({status})"))
            }
            401 | 403 | 404 => match self {
                Self::Repo { repo, repo_id, .. } => repo_refusal(hub, answer, repo, repo_id).into(),
                Self::Url { url, .. } if status == 404 => {
                    let hint = "check the address".to_owned();
                    Error::Missing { what: "file on the web".to_owned(), path: PathBuf::from(url), hint }.into()
                }
                Self::Url { url, .. } => {
                    Error::refused(format!("no access to `{url}` ({status})"), "check the address or give a token")
                        .into()
                }
            },
            _ => Error::refused(format!("`{from}` answers {status} for `{}`", self.name()), "check HF_ENDPOINT").into(),
        }
    }
}

/// 401, 403 and 404 from the Hub itself. Without a token it answers 401 for what does not exist, too.
fn repo_refusal(hub: &Hub, answer: &Answer, repo: &Repo, repo_id: &str) -> Error {
    let (endpoint, status) = (&hub.endpoint, answer.status());
    let code = answer.header("x-error-code").unwrap_or_default();
    let message = answer.header("x-error-message").unwrap_or_default();
    let missing =
        |what: &str, path: &str, hint: String| Error::Missing { what: what.to_owned(), path: path.into(), hint };
    match (&hub.token, code) {
        (Some(token), _) if status == 401 && (code.is_empty() || message.contains("Invalid credentials")) => {
            Error::refused(
                format!("the access token {} is not valid", token.origin),
                format!("make one at {endpoint}/settings/tokens and give it with --access_token or HF_TOKEN"),
            )
        }
        (_, "RevisionNotFound") => missing(
            &format!("revision of `{repo_id}`"),
            repo.revision(),
            format!("the branches and tags are at {endpoint}/{}/tree/main; without --revision it is main", repo.url()),
        ),
        (_, "EntryNotFound") => missing(
            &format!("file of `{repo_id}`"),
            message,
            "the repository changed in between; run the same command again".to_owned(),
        ),
        (_, code) if status == 404 || code == "RepoNotFound" => {
            let hint = match nearest_model(repo_id) {
                _ if is_dataset(repo) => {
                    format!("look it up at {endpoint}/datasets; a private one needs --access_token or HF_TOKEN")
                }
                Some(name) => format!("did you mean `{name}`? a private repository needs --access_token or HF_TOKEN"),
                None => {
                    "`litgpt download list` shows names; a private repository needs --access_token or HF_TOKEN".into()
                }
            };
            let what = if is_dataset(repo) { "dataset" } else { "repository" };
            missing(&format!("{what} at {endpoint}"), repo_id, hint)
        }
        (token, _) => Error::refused(
            format!("no access to `{repo_id}` ({status}): it is gated or private"),
            match token {
                None => format!("accept the licence at {endpoint}/{} and give --access_token or HF_TOKEN", repo.url()),
                Some(token) => format!(
                    "accept the licence at {endpoint}/{} with the account of the token {}, and let that token read \
                     gated repositories",
                    repo.url(),
                    token.origin
                ),
            },
        ),
    }
}

fn is_dataset(repo: &Repo) -> bool {
    repo.url().starts_with("datasets/")
}

/// The listed model whose name is closest, if one is close.
fn nearest_model(repo_id: &str) -> Option<&'static str> {
    let wanted = repo_id.to_lowercase();
    let name_of = |id: &str| id.rsplit('/').next().unwrap_or_default().to_lowercase();
    let distance =
        |id: &str| if name_of(id) == name_of(&wanted) { 1 } else { edit_distance(&id.to_lowercase(), &wanted) };
    let (name, distance) = models().map(|(id, _)| (id, distance(id))).min_by_key(|&(_, distance)| distance)?;
    (distance <= (wanted.len() / 6).max(2)).then_some(name)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_suggested_and_far_ones_not() {
        assert_eq!(nearest_model("qwen/qwen3-0.6b"), Some("Qwen/Qwen3-0.6B"));
        assert_eq!(nearest_model("meta/llama-3.2-1B"), Some("meta-llama/Llama-3.2-1B"));
        assert_eq!(nearest_model("microsoft/phi2"), Some("microsoft/phi-2"));
        assert_eq!(nearest_model("somebody/something-else"), None);
    }
}
