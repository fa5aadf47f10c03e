//! What a server answers, and addresses on the web.

use std::time::Duration;

use crate::error::{Error, Result};

/// What the Hub says of a file on the way to its bytes.
#[derive(Clone, Default)]
pub(super) struct Linked {
    pub(super) size: Option<u64>,
    pub(super) digest: Option<String>,
}

pub(super) struct Answer {
    pub(super) response: ureq::http::Response<ureq::Body>,
    pub(super) linked: Linked,
    /// Whether it is the endpoint's own, not the CDN's.
    pub(super) at_home: bool,
}

impl Answer {
    pub(super) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    /// Size and hash by the endpoint's headers, kept from an earlier answer where this one is silent.
    pub(super) fn linked(&self) -> Linked {
        let mut linked = self.linked.clone();
        if self.at_home {
            let own = self.header("x-repo-commit").and(self.header("etag")).filter(|_| self.status() < 300);
            let digest = self.header("x-linked-etag").or(own).map(|etag| etag.trim_matches('"').to_owned());
            linked.size = linked.size.or_else(|| self.header("x-linked-size")?.parse().ok());
            linked.digest = linked.digest.or(digest);
        }
        linked
    }

    /// First byte and whole size of a partial answer.
    pub(super) fn range(&self) -> Option<(u64, Option<u64>)> {
        let (range, total) = self.header("content-range")?.strip_prefix("bytes ")?.split_once('/')?;
        Some((range.split_once('-')?.0.trim().parse().ok()?, total.trim().parse().ok()))
    }

    /// The size of the whole file.
    pub(super) fn total(&self) -> Option<u64> {
        match self.status() {
            206 => self.range()?.1,
            _ if self.header("content-encoding").is_some_and(|encoding| encoding != "identity") => None,
            _ => self.header("content-length")?.trim().parse().ok(),
        }
    }

    pub(super) fn retry_after(&self) -> Option<Duration> {
        let asked = self.header("retry-after").and_then(|after| after.trim().parse().ok());
        // `RateLimit: "api";r=0;t=55`, as the Hub says it.
        let reset =
            || self.header("ratelimit")?.split(';').find_map(|field| field.trim().strip_prefix("t=")?.parse().ok());
        asked.or_else(reset).map(Duration::from_secs)
    }
}

pub(super) fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|c| c.is_ascii_hexdigit())
}

pub(super) fn is_web_address(url: &str) -> bool {
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
    rest.is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/')) && url.chars().all(|c| c.is_ascii_graphic())
}

/// Scheme, host and port of an address.
pub(super) fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    &url[..end]
}

/// Where a redirect leads.
pub(super) fn join(url: &str, location: &str) -> Result<String> {
    let scheme = url.split("//").next().unwrap_or_default();
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let joined = match location {
        _ if is_web_address(location) => location.to_owned(),
        _ if location.starts_with("//") => format!("{scheme}{location}"),
        _ if location.starts_with('/') => format!("{}{location}", origin(url)),
        _ if path.len() == origin(url).len() => format!("{path}/{location}"),
        _ => format!("{}/{location}", path.rsplit_once('/').map_or(path, |(folder, _)| folder)),
    };
    if !is_web_address(&joined) || (url.starts_with("https:") && !joined.starts_with("https:")) {
        let message = format!("`{}` redirects to where it is not safe to follow: {location:?}", origin(url));
        return Err(Error::refused(message, "check HF_ENDPOINT and whether a proxy or login page is in between"));
    }
    Ok(joined)
}

/// Percent-encodes all that is special in an address.
fn escape(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let escaped = |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    name.bytes().map(escaped).collect()
}

/// The same, but for the slashes between folders.
pub(super) fn escape_path(name: &str) -> String {
    name.split('/').map(escape).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_joined_and_never_leave_https() {
        let url = "https://hub.co/a/b?c=/d/";
        assert_eq!(join(url, "https://cdn.co/x").unwrap(), "https://cdn.co/x");
        assert_eq!(join(url, "//cdn.co/x").unwrap(), "https://cdn.co/x");
        assert_eq!(join(url, "/x?y").unwrap(), "https://hub.co/x?y");
        assert_eq!(join(url, "x").unwrap(), "https://hub.co/a/x");
        assert_eq!(join("http://hub.co", "x").unwrap(), "http://hub.co/x");
        assert!(join(url, "http://cdn.co/x").is_err());
        assert!(join(url, "file:///etc/passwd").is_ok_and(|url| url.starts_with("https://hub.co/")));
    }

    #[test]
    fn addresses_are_escaped() {
        assert_eq!(escape("tokenizer#1 ä.json"), "tokenizer%231%20%C3%A4.json");
    }
}
