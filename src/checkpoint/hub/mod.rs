//! Bring files from the Hugging Face Hub, or from any web server, whole and right.
//!
//! Here live: which files of a repository are needed, the Hub's two routes (`/api/models/…/revision/…?blobs=true` lists
//! names, sizes and hashes; `/…/resolve/…` gives a file, often by a redirect to a CDN), resuming, retries, verification,
//! and the names that `download list` offers. Not here: reading what came (`checkpoint`), flags and bars (`cli`).
//!
//! A file is written to `NAME.part`, with the hash that it must come to in `NAME.part.etag`. It gets its own name only
//! after size and hash are right and the bytes are on the disk, so a file under its own name is whole whenever the
//! process is killed; the next run verifies what is there and goes on where a part ends. `config.json` comes last: a
//! folder that has it had everything.
//!
//! hf-hub knows the conventions (routes, `HF_HOME`, the cached login), which are used from it. Its own transfers go into
//! its cache as blobs and symbolic links, trust a part of any origin and verify no hash, so the transfers here are
//! `ureq`'s, the client that hf-hub uses too. Hashes are `ring`'s, which `ureq`'s TLS brings along. Redirects are followed
//! here, because the Hub names a file's hash on the redirect and the token must not travel on to the CDN.

mod answer;
mod listing;
mod part;
mod transfer;
mod trouble;

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::{Cache, Repo, RepoType};

use crate::error::{Error, Result};
use answer::{escape_path, is_web_address};
use listing::{Listing, Weights, is_plain_name, outside, shards};
use part::{Item, is_right, plain_file, wait_for_turn};
use transfer::agent;
use trouble::Errand;

const ENDPOINT: &str = "https://huggingface.co";
const MODELS: &str = include_str!("../../../data/models.tsv");
/// A connection that brings nothing for so long counts as broken.
const STALL: Duration = Duration::from_secs(60);
const LISTING_LIMIT_BYTES: u64 = 64 << 20;
/// A text that is read from the web is short.
const TEXT_LIMIT_BYTES: u64 = 1 << 20;

/// The models that `download list` offers: repository and family. Any other repository of a supported family works too.
pub fn models() -> impl Iterator<Item = (&'static str, &'static str)> {
    MODELS.lines().filter_map(|line| line.split_once('\t'))
}

/// Whether `text` has the form of a repository id of the Hub: `organisation/name`.
#[must_use]
pub fn is_repo_id(text: &str) -> bool {
    let good = |part: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        part.len() <= 96
            && part.starts_with(plain)
            && part.ends_with(plain)
            && part.chars().all(|c| plain(c) || c == '-' || c == '.')
            && !part.contains("--")
            && !part.contains("..")
    };
    text.split_once('/').is_some_and(|(organisation, name)| good(organisation) && good(name))
}

/// Whoever shows how far a download is. No method is called again before it returned.
pub trait Progress {
    /// All files are known: their number, their bytes, and the bytes of them that are here already. Called once.
    fn total(&mut self, _files: usize, _bytes: u64, _have: u64) {}
    /// A file begins, of `size` bytes (0: unknown) with `have` of them here. Called again when it starts over.
    fn file(&mut self, name: &str, size: u64, have: u64);
    /// `n` more bytes of the file that began last.
    fn bytes(&mut self, n: u64);
    /// The file is whole, verified and under its name.
    fn done(&mut self, name: &str);
    /// Something the user may want to know: a retry, a file that was spoiled.
    fn note(&mut self, line: &str);
}

/// Passes on what the user should read, and counts nothing.
struct NotesOnly<'a>(&'a mut dyn Progress);

impl Progress for NotesOnly<'_> {
    fn file(&mut self, _: &str, _: u64, _: u64) {}
    fn bytes(&mut self, _: u64) {}
    fn done(&mut self, _: &str) {}
    fn note(&mut self, line: &str) {
        self.0.note(line);
    }
}

/// What to download.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// `organisation/name`.
    pub repo_id: &'a str,
    /// Branch, tag or commit; `None` is `main`.
    pub revision: Option<&'a str>,
    /// The folder that gets `organisation/name/` with the files.
    pub into: &'a Path,
    /// Leave the weights where they are.
    pub tokenizer_only: bool,
}

/// A Hub (or its mirror) and what one needs to talk to it.
pub struct Hub {
    agent: ureq::Agent,
    endpoint: String,
    token: Option<Token>,
    offline: bool,
    sleep: Box<dyn Fn(Duration) + Send + Sync>,
}

struct Token {
    secret: String,
    /// Where it was found, for the message when it is refused.
    origin: String,
}

impl Hub {
    /// The Hub of the environment: `HF_ENDPOINT`, the token from `token` (the flag), `HF_TOKEN` or the cached login under
    /// `HF_HOME`, and `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// `HF_ENDPOINT` is not an address, or the token cannot be one.
    pub fn from_env(token: Option<String>) -> Result<Self> {
        Self::from_vars(token, |name| std::env::var(name).ok())
    }

    fn from_vars(token: Option<String>, var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let var = |name: &str| var(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let token = match token {
            Some(secret) => Some(Token { secret, origin: "of --access_token".to_owned() }),
            None => found_token(&var),
        };
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let mut hub = Self::with_token(&endpoint, token)?;
        hub.offline = var("HF_HUB_OFFLINE").is_some_and(|v| ["1", "true", "yes", "on"].contains(&&*v.to_lowercase()));
        Ok(hub)
    }

    /// The Hub at `endpoint` (`https://…`), whatever the environment says.
    ///
    /// # Errors
    /// `endpoint` is not an address, or the token cannot be one.
    pub fn new(endpoint: &str, token: Option<String>) -> Result<Self> {
        Self::with_token(endpoint, token.map(|secret| Token { secret, origin: "of --access_token".to_owned() }))
    }

    fn with_token(endpoint: &str, token: Option<Token>) -> Result<Self> {
        let endpoint = endpoint.trim_end_matches('/');
        if !is_web_address(endpoint) {
            return Err(Error::usage(
                format!("HF_ENDPOINT is not a web address: `{endpoint}`"),
                format!("write it like `{ENDPOINT}`, or unset it"),
            ));
        }
        let token = token.map(|t| Token { secret: t.secret.trim().to_owned(), ..t }).filter(|t| !t.secret.is_empty());
        if let Some(Token { origin, .. }) = token.as_ref().filter(|t| !t.secret.chars().all(|c| c.is_ascii_graphic())) {
            return Err(Error::usage(
                format!("the access token {origin} holds a character that no token has"),
                format!("copy it again from {endpoint}/settings/tokens"),
            ));
        }
        let sleep = Box::new(std::thread::sleep);
        Ok(Self { agent: agent(STALL), endpoint: endpoint.to_owned(), token, offline: false, sleep })
    }

    /// Another way to wait between two tries, for tests.
    #[must_use]
    pub fn with_sleep(mut self, sleep: impl Fn(Duration) + Send + Sync + 'static) -> Self {
        self.sleep = Box::new(sleep);
        self
    }

    /// Another time after which a silent connection counts as broken; the default is a minute.
    #[must_use]
    pub fn with_stall(mut self, stall: Duration) -> Self {
        self.agent = agent(stall);
        self
    }

    /// Downloads what is needed of a repository into `into/organisation/name/`, keeps what is there and right, and gives
    /// that folder. Two processes may do it at once; the second waits, then verifies.
    ///
    /// # Errors
    /// No such repository or revision, no access, no network, no space, or content that is not what the Hub lists.
    pub fn download(&self, request: &Request<'_>, progress: &mut dyn Progress) -> Result<PathBuf> {
        let repo_id = request.repo_id;
        if !is_repo_id(repo_id) {
            return Err(Error::usage(
                format!("not a repository id: `{repo_id}`"),
                "write `organisation/name`, as in `litgpt download Qwen/Qwen3-0.6B`; `litgpt download list` shows some",
            ));
        }
        let revision = request.revision.unwrap_or("main");
        if revision.is_empty() || !revision.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c)) {
            return Err(Error::usage(format!("not a revision: `{revision}`"), "give a branch, a tag or a commit"));
        }
        let repo = Repo::with_revision(repo_id.to_owned(), RepoType::Model, revision.to_owned());
        let dir = request.into.join(repo_id);
        let errand = Errand::Repo { repo: &repo, repo_id, dir: &dir };
        let listing = self.listing(&errand, &repo, progress)?;
        fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
        let _alone = wait_for_turn(&dir, progress)?;
        let mut names = listing.small_files();
        if !request.tokenizer_only {
            names.extend(self.weights(&errand, &listing, progress)?);
        }
        names.sort_by_key(|name| name == "config.json");
        let items = names.iter().map(|name| self.item(&errand, &listing, name)).collect::<Result<Vec<_>>>()?;
        self.bring_all(&errand, &items, progress)?;
        Ok(dir)
    }

    /// Downloads those files of a dataset's repository that `choose` takes of all names into `into`, below which they keep
    /// their names; files that are there and right are kept.
    ///
    /// # Errors
    /// As [`Hub::download`], and those of `choose`.
    pub fn dataset(
        &self,
        repo_id: &str,
        into: &Path,
        choose: &mut dyn FnMut(&[String]) -> Result<Vec<String>>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        if !is_repo_id(repo_id) {
            let hint = "write `organisation/name`, as in --data tatsu-lab/alpaca";
            return Err(Error::usage(format!("not a repository id: `{repo_id}`"), hint));
        }
        let repo = Repo::dataset(repo_id.to_owned());
        let errand = Errand::Repo { repo: &repo, repo_id, dir: into };
        let listing = self.listing(&errand, &repo, progress)?;
        let all: Vec<String> = listing.siblings.iter().map(|sibling| sibling.rfilename.clone()).collect();
        let names = choose(&all)?;
        if let Some(name) = names.iter().find(|name| !name.split('/').all(is_plain_name)) {
            return Err(outside(&self.endpoint, name));
        }
        fs::create_dir_all(into).map_err(Error::io("create", into))?;
        let _alone = wait_for_turn(into, progress)?;
        let items = names.iter().map(|name| self.item(&errand, &listing, name)).collect::<Result<Vec<_>>>()?;
        for dir in items.iter().filter_map(|item| item.to.parent()) {
            fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        }
        self.bring_all(&errand, &items, progress)
    }

    /// Downloads one file from `url` to `to`, resuming where the server can. A file that is there is kept as it is.
    ///
    /// # Errors
    /// No such file, no access, no network, no space, or fewer or more bytes than the server promised.
    pub fn fetch_url(&self, url: &str, to: &Path, progress: &mut dyn Progress) -> Result<()> {
        if !is_web_address(url) {
            return Err(Error::usage(format!("not a web address: `{url}`"), "it begins with https://"));
        }
        let errand = Errand::Url { url, to: Some(to) };
        let Some(name) = to.file_name() else {
            return Err(Error::usage(format!("not a file name: `{}`", to.display()), "name the file to write"));
        };
        let parent = to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if plain_file(to)?.is_some() {
            return Ok(());
        }
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        let _alone = wait_for_turn(parent, progress)?;
        if plain_file(to)?.is_some() {
            return Ok(());
        }
        let name = name.to_string_lossy().into_owned();
        // A mirror has what the Hub has.
        let path = url.strip_prefix(ENDPOINT).filter(|path| path.starts_with('/'));
        let url = path.map_or_else(|| url.to_owned(), |path| format!("{}{path}", self.endpoint));
        self.bring(&errand, &Item { name, url, to: to.to_owned(), size: None, digest: None }, progress)
    }

    /// The text at `url`, such as a recipe; at most 1 MB.
    ///
    /// # Errors
    /// No such file, no access, no network, too long, or not UTF-8.
    pub fn read_text(&self, url: &str, progress: &mut dyn Progress) -> Result<String> {
        if !is_web_address(url) {
            return Err(Error::usage(format!("not a web address: `{url}`"), "it begins with https://"));
        }
        let bytes = self.read(&Errand::Url { url, to: None }, url, TEXT_LIMIT_BYTES, progress)?;
        let hint = "give the address of a text file";
        String::from_utf8(bytes).map_err(|_| Error::invalid(Path::new(url), "not a text file", hint))
    }

    fn listing(&self, errand: &Errand<'_>, repo: &Repo, progress: &mut dyn Progress) -> Result<Listing> {
        let url = format!("{}/api/{}?blobs=true", self.endpoint, repo.api_url());
        let body = self.read(errand, &url, LISTING_LIMIT_BYTES, progress)?;
        let listing: Listing = serde_json::from_slice(&body).map_err(|error| {
            let message = format!("`{}` does not answer like the Hugging Face Hub: {error}", self.endpoint);
            Error::refused(message, "check HF_ENDPOINT and whether a proxy or login page is in between")
        })?;
        listing.checked(&self.endpoint)
    }

    /// The names of the weight files. An index is brought first, since it says which files these are.
    fn weights(&self, errand: &Errand<'_>, listing: &Listing, progress: &mut dyn Progress) -> Result<Vec<String>> {
        match listing.weights() {
            Some(Weights::Files(names)) => Ok(names),
            Some(Weights::Index(index)) => {
                let item = self.item(errand, listing, &index)?;
                let mut notes = NotesOnly(progress); // It is among the names below, and counted there.
                if !is_right(&item, &mut notes)? {
                    self.bring(errand, &item, &mut notes)?;
                }
                let mut names = shards(&item.to)?;
                names.push(index);
                Ok(names)
            }
            None => Err(Error::unsupported(
                format!("a repository without *.safetensors and pytorch_model*.bin: `{}`", errand.name()),
                listing.instead_of_weights(),
            )),
        }
    }

    fn item(&self, errand: &Errand<'_>, listing: &Listing, name: &str) -> Result<Item> {
        let Errand::Repo { repo, repo_id, dir } = errand else { unreachable!("only repositories have listings") };
        let Some(sibling) = listing.siblings.iter().find(|s| s.rfilename == name) else {
            return Err(Error::refused(
                format!("`{repo_id}` has no file `{name}`, which its index names"),
                "the repository is incomplete; try another --revision",
            ));
        };
        let revision = listing.commit().map_or_else(|| repo.url_revision().into(), Cow::Borrowed);
        Ok(Item {
            name: name.to_owned(),
            url: format!("{}/{}/resolve/{revision}/{}", self.endpoint, repo.url(), escape_path(name)),
            to: dir.join(name),
            size: sibling.size(),
            digest: sibling.digest(),
        })
    }
}

/// The token of the environment or of the cached login, in the order of `huggingface_hub`.
fn found_token(var: &dyn Fn(&str) -> Option<String>) -> Option<Token> {
    for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
        if let Some(secret) = var(name) {
            return Some(Token { secret, origin: format!("of {name}") });
        }
    }
    let home = || {
        let cache = var("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| std::env::home_dir().map(|home| home.join(".cache")));
        cache.map(|cache| cache.join("huggingface"))
    };
    if let Some(path) = var("HF_TOKEN_PATH") {
        let secret = fs::read_to_string(&path).ok()?;
        return Some(Token { secret, origin: format!("in `{path}`") });
    }
    let cache = Cache::new(var("HF_HOME").map(PathBuf::from).or_else(home)?.join("hub"));
    cache.token().map(|secret| Token { secret, origin: format!("in `{}`", cache.token_path().display()) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::model::families::FAMILIES;
    use std::collections::BTreeSet;

    #[test]
    fn offered_models_are_ids_of_supported_families_and_named_once() {
        let mut seen = BTreeSet::new();
        for (id, family) in models() {
            assert!(is_repo_id(id) && seen.insert(id), "{id}");
            assert!(FAMILIES.iter().any(|f| f.model_types[0] == family), "{id}: {family}");
        }
        assert_eq!(seen.len(), MODELS.lines().count(), "every line has a tab");
        assert!(FAMILIES.iter().all(|family| models().any(|(_, f)| f == family.model_types[0])));
    }

    #[test]
    fn repository_ids() {
        for good in ["Qwen/Qwen3-0.6B", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "a/b", "microsoft/phi-1_5", "_a/b_"] {
            assert!(is_repo_id(good), "{good}");
        }
        for bad in ["", "gpt2", "a/b/c", "../b", "a/..", "./a", "/a", "a/", "a\\b/c", "a/b c", "a/b--c", "a/-b", "~/a"]
        {
            assert!(!is_repo_id(bad), "{bad}");
        }
    }

    #[test]
    fn settings_come_from_flag_then_variables_then_login() {
        let home = tempfile::tempdir().unwrap();
        let home_path = home.path().to_str().unwrap().to_owned();
        let hub = |flag: Option<&str>, vars: &[(&str, &str)]| {
            let find = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
            Hub::from_vars(flag.map(str::to_owned), find).unwrap()
        };
        let token = |hub: Hub| hub.token.map(|token| token.secret);
        let in_home = ("HF_HOME", home_path.as_str());
        assert_eq!(token(hub(None, &[in_home])), None);
        fs::write(home.path().join("token"), "hf_login\n").unwrap();
        assert_eq!(token(hub(None, &[in_home])).as_deref(), Some("hf_login"));
        assert_eq!(token(hub(None, &[in_home, ("HF_TOKEN", " hf_var ")])).as_deref(), Some("hf_var"));
        assert_eq!(token(hub(Some("hf_flag"), &[in_home, ("HF_TOKEN", "hf_var")])).as_deref(), Some("hf_flag"));
        assert_eq!(token(hub(None, &[in_home, ("HF_TOKEN", "")])).as_deref(), Some("hf_login"));
        assert_eq!(hub(None, &[in_home]).endpoint, ENDPOINT);
        assert_eq!(hub(None, &[in_home, ("HF_ENDPOINT", "http://mirror:8/")]).endpoint, "http://mirror:8");
        assert!(hub(None, &[in_home, ("HF_HUB_OFFLINE", "1")]).offline);
        assert!(Hub::new("mirror", None).is_err());
        let error = Hub::new(ENDPOINT, Some("hf_a\nb".into())).err().unwrap();
        assert!(!error.to_string().contains("hf_a"), "{error}");
    }
}
