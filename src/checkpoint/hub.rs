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

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::{Cache, Repo, RepoType};
use ring::digest;
use serde::Deserialize;

use crate::error::{Error, Result, edit_distance};

const ENDPOINT: &str = "https://huggingface.co";
const MODELS: &str = include_str!("../../data/models.tsv");
/// How often in a row a request may fail without one byte more on the disk.
const TRIES: u32 = 6;
/// How often the first request may fail to reach the server at all: whoever is offline should hear it soon.
const TRIES_TO_REACH: u32 = 2;
/// A server that asks for a longer pause than this is not waited for.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
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

    /// What `url` gives, kept in memory.
    fn read(&self, errand: &Errand<'_>, url: &str, limit_bytes: u64, progress: &mut dyn Progress) -> Result<Vec<u8>> {
        let mut tries = 0;
        loop {
            let trouble = match self.read_once(errand, url, limit_bytes) {
                Ok(body) => return Ok(body),
                Err(trouble) => trouble,
            };
            tries += 1;
            let limit = if matches!(trouble, Trouble::Unreachable(_)) { TRIES_TO_REACH } else { TRIES };
            self.pause(errand, tries, limit, trouble, progress)?;
        }
    }

    fn read_once(&self, errand: &Errand<'_>, url: &str, limit_bytes: u64) -> std::result::Result<Vec<u8>, Trouble> {
        let mut answer = self.get(errand, url, &[])?;
        if answer.status() != 200 {
            return Err(errand.refusal(self, &answer));
        }
        answer.response.body_mut().with_config().limit(limit_bytes).read_to_vec().map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(_) => {
                let message = format!("`{}` gives more than {} MB", errand.name(), limit_bytes >> 20);
                Error::refused(message, "check the address").into()
            }
            error => Trouble::broken(error.to_string()),
        })
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
            size: sibling.lfs.as_ref().and_then(|lfs| lfs.size).or(sibling.size),
            digest: sibling.digest(),
        })
    }

    fn bring_all(&self, errand: &Errand<'_>, items: &[Item], progress: &mut dyn Progress) -> Result<()> {
        let mut right = Vec::with_capacity(items.len());
        let mut have = 0;
        for item in items {
            right.push(is_right(item, progress)?);
            have += if right.last() == Some(&true) { item.size.unwrap_or(0) } else { Part::kept_bytes(item)? };
        }
        progress.total(items.len(), items.iter().filter_map(|item| item.size).sum(), have);
        for (item, right) in items.iter().zip(right) {
            if right {
                let size = item.size.unwrap_or(0);
                progress.file(&item.name, size, size);
                progress.done(&item.name);
            } else {
                self.bring(errand, item, progress)?;
            }
        }
        Ok(())
    }

    fn bring(&self, errand: &Errand<'_>, item: &Item, progress: &mut dyn Progress) -> Result<()> {
        let mut part = Part::open(item)?;
        progress.file(&item.name, item.size.unwrap_or(0), part.have);
        let (mut tries, mut farthest, mut began_anew) = (0, part.have, false);
        loop {
            match self.attempt(errand, item, &mut part, progress) {
                Ok(()) if part.is_right() => break,
                Ok(()) if part.resumed && !began_anew => {
                    began_anew = true;
                    progress.note(&format!("`{}`: the part from before is spoiled; starting over", item.name));
                    part.restart()?;
                    progress.file(&item.name, item.size.unwrap_or(0), 0);
                }
                Ok(()) => return Err(part.wrong_hash()),
                Err(trouble) => {
                    if part.have > farthest {
                        (tries, farthest) = (0, part.have);
                    }
                    tries += 1;
                    self.pause(errand, tries, TRIES, trouble, progress)?;
                }
            }
        }
        part.finish()?;
        progress.done(&item.name);
        Ok(())
    }

    /// One request for what is missing of a file.
    fn attempt(
        &self,
        errand: &Errand<'_>,
        item: &Item,
        part: &mut Part<'_>,
        progress: &mut dyn Progress,
    ) -> std::result::Result<(), Trouble> {
        if part.size == Some(part.have) {
            return Ok(());
        }
        let mut headers = Vec::new();
        if part.have > 0 {
            headers.push(("Range", format!("bytes={}-", part.have)));
            headers.extend(part.etag.iter().map(|etag| ("If-Range", etag.clone())));
        }
        let answer = self.get(errand, &item.url, &headers)?;
        match answer.status() {
            206 if part.have > 0 && answer.range().is_some_and(|(start, _)| start == part.have) => part.resumed = true,
            200 => {
                if part.have > 0 {
                    part.restart()?;
                    progress.file(&item.name, item.size.unwrap_or(0), 0);
                }
            }
            206 | 416 => {
                part.restart()?;
                progress.file(&item.name, item.size.unwrap_or(0), 0);
                return Err(Trouble::broken("the server does not go on where the part ends"));
            }
            _ => return Err(errand.refusal(self, &answer)),
        }
        let size = part.size;
        part.expect(&answer)?;
        if let (None, Some(size)) = (size, part.size) {
            progress.file(&item.name, size, part.have);
        }
        copy(answer, part, progress)
    }

    /// Asks and follows redirects, remembering what the Hub says about the file on the way.
    fn get(&self, errand: &Errand<'_>, url: &str, headers: &[(&str, String)]) -> std::result::Result<Answer, Trouble> {
        if self.offline {
            return Err(errand.unreachable(self, "HF_HUB_OFFLINE is set").into());
        }
        let (mut url, mut linked) = (url.to_owned(), Linked::default());
        for _ in 0..10 {
            let mut request = self.agent.get(&url);
            let at_home = origin(&url).eq_ignore_ascii_case(origin(&self.endpoint));
            if let Some(token) = self.token.as_ref().filter(|_| at_home) {
                request = request.header("Authorization", format!("Bearer {}", token.secret));
            }
            for (name, value) in headers {
                request = request.header(*name, value);
            }
            let response = request.call().map_err(|error| trouble_of(&url, error))?;
            let answer = Answer { response, linked, at_home };
            linked = answer.linked();
            let location = answer.header("location").map(str::to_owned);
            match location.filter(|_| matches!(answer.status(), 301 | 302 | 303 | 307 | 308)) {
                Some(location) => url = join(&url, &location)?,
                None => return Ok(Answer { linked, ..answer }),
            }
        }
        Err(Trouble::broken(format!("too many redirects from `{}`", origin(&url))))
    }

    /// Waits before the next try, or says why there is none.
    fn pause(
        &self,
        errand: &Errand<'_>,
        tries: u32,
        limit: u32,
        trouble: Trouble,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let (why, after) = match &trouble {
            Trouble::Fatal(_) => (String::new(), None),
            Trouble::Unreachable(why) => (why.clone(), None),
            Trouble::Broken { why, after } => (why.clone(), *after),
        };
        let wait = after.unwrap_or(Duration::from_secs(1 << (tries - 1).min(5)));
        match trouble {
            Trouble::Fatal(error) => Err(error),
            Trouble::Unreachable(why) if tries >= limit => Err(errand.unreachable(self, &why)),
            Trouble::Broken { why, .. } if wait > LONGEST_WAIT => {
                Err(errand.gave_up(&format!("{why}, asking to wait {} s", wait.as_secs())))
            }
            Trouble::Broken { why, .. } if tries >= limit => Err(errand.gave_up(&format!("{why}, {tries} times"))),
            _ => {
                progress.note(&format!("{why}; trying again in {} s ({tries} of {})", wait.as_secs(), limit - 1));
                (self.sleep)(wait);
                Ok(())
            }
        }
    }
}

fn agent(stall: Duration) -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .timeout_resolve(Some(STALL))
        .timeout_connect(Some(STALL))
        .timeout_recv_response(Some(stall))
        .timeout_per_read(Some(stall))
        .user_agent(concat!("litgpt/", env!("CARGO_PKG_VERSION")))
        .accept_encoding("identity"); // A range of compressed bytes would be of no use.
    config.build().into()
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

/// What went wrong with one request.
enum Trouble {
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
    fn broken(why: impl Into<String>) -> Self {
        Self::Broken { why: why.into(), after: None }
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Fatal(error)
    }
}

fn trouble_of(url: &str, error: ureq::Error) -> Trouble {
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
enum Errand<'a> {
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
    fn name(&self) -> &str {
        match self {
            Self::Repo { repo_id, .. } => repo_id,
            Self::Url { url, .. } => url,
        }
    }

    fn unreachable(&self, hub: &Hub, why: &str) -> Error {
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

    fn gave_up(&self, why: &str) -> Error {
        let hint = if why.contains("429") {
            "wait some minutes and run the same command again; requests with --access_token or HF_TOKEN may come oftener"
        } else {
            "run the same command again: it goes on where it stopped"
        };
        Error::refused(format!("cannot download `{}`: {why}", self.name()), hint)
    }

    /// Why an answer that is not the file is not the file.
    fn refusal(&self, hub: &Hub, answer: &Answer) -> Trouble {
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

/// The listed model whose name is closest, if one is close.
fn nearest_model(repo_id: &str) -> Option<&'static str> {
    let wanted = repo_id.to_lowercase();
    let name_of = |id: &str| id.rsplit('/').next().unwrap_or_default().to_lowercase();
    let distance =
        |id: &str| if name_of(id) == name_of(&wanted) { 1 } else { edit_distance(&id.to_lowercase(), &wanted) };
    let (name, distance) = models().map(|(id, _)| (id, distance(id))).min_by_key(|&(_, distance)| distance)?;
    (distance <= (wanted.len() / 6).max(2)).then_some(name)
}

/// What the Hub says about a repository at a revision.
#[derive(Deserialize)]
struct Listing {
    sha: Option<String>,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

impl Sibling {
    fn digest(&self) -> Option<Digest> {
        match &self.lfs {
            Some(lfs) => lfs.sha256.as_deref().and_then(Digest::sha256),
            None => self.blob_id.as_deref().and_then(Digest::git_blob),
        }
    }
}

enum Weights {
    Files(Vec<String>),
    /// The index that names them.
    Index(String),
}

impl Listing {
    /// Refuses names that lead out of the folder. Files in folders are never fetched, so only `..`, a root and what
    /// would be a folder on some system are of concern.
    fn checked(self, endpoint: &str) -> Result<Self> {
        let escapes = |name: &str| {
            name.split(['/', '\\']).any(|part| part == "..")
                || name.starts_with(['/', '\\'])
                || name.get(1..2) == Some(":")
                || (!name.contains('/') && is_wanted(name) && !is_plain_name(name))
        };
        match self.siblings.iter().find(|sibling| escapes(&sibling.rfilename)) {
            None => Ok(self),
            Some(Sibling { rfilename, .. }) => Err(outside(endpoint, rfilename)),
        }
    }

    fn commit(&self) -> Option<&str> {
        self.sha.as_deref().filter(|sha| is_hex(sha, 40))
    }

    fn at_top(&self) -> impl Iterator<Item = &str> {
        self.siblings.iter().map(|s| s.rfilename.as_str()).filter(|name| is_plain_name(name))
    }

    fn small_files(&self) -> Vec<String> {
        self.at_top().filter(|name| is_small_file(name)).map(str::to_owned).collect()
    }

    /// The weights in the order in which `transformers` looks for them.
    fn weights(&self) -> Option<Weights> {
        let has = |wanted: &str| self.at_top().any(|name| name == wanted);
        for (whole, index, is_part) in [
            ("model.safetensors", "model.safetensors.index.json", is_safetensors as fn(&str) -> bool),
            ("pytorch_model.bin", "pytorch_model.bin.index.json", is_pickle),
        ] {
            if has(whole) {
                return Some(Weights::Files(vec![whole.to_owned()]));
            }
            if has(index) {
                return Some(Weights::Index(index.to_owned()));
            }
            let names: Vec<_> = self.at_top().filter(|name| is_part(name)).map(str::to_owned).collect();
            if !names.is_empty() {
                return Some(Weights::Files(names));
            }
        }
        None
    }

    fn instead_of_weights(&self) -> String {
        let has = |test: fn(&str) -> bool| self.siblings.iter().any(|sibling| test(&sibling.rfilename));
        match () {
            () if has(|name| name == "adapter_config.json") => "it holds an adapter; download the base model it names",
            () if has(|name| name.ends_with(".gguf")) => {
                "it holds GGUF files; download the repository they were made from"
            }
            () if has(|name| name.starts_with("consolidated")) => "download the variant in the transformers format",
            () => "with --tokenizer_only the other files come alone",
        }
        .to_owned()
    }
}

fn outside(endpoint: &str, name: &str) -> Error {
    let message = format!("`{endpoint}` lists a file that would be written outside its folder: {name:?}");
    Error::refused(message, "nothing was written; check HF_ENDPOINT")
}

fn is_dataset(repo: &Repo) -> bool {
    repo.url().starts_with("datasets/")
}

fn is_small_file(name: &str) -> bool {
    let exact = [
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
    ];
    exact.contains(&name) || (name.starts_with("tokenizer") && !is_safetensors(name))
}

fn is_safetensors(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.starts_with("consolidated") && !name.starts_with("adapter")
}

fn is_pickle(name: &str) -> bool {
    name.starts_with("pytorch_model") && name.ends_with(".bin")
}

fn is_wanted(name: &str) -> bool {
    is_small_file(name) || is_safetensors(name) || is_pickle(name) || name.ends_with(".index.json")
}

/// Whether `name` is one component of a path on every system.
fn is_plain_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', ':']) && !name.chars().any(char::is_control)
}

/// The files that an index of weights names.
fn shards(index: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: serde_json::Map<String, serde_json::Value>,
    }
    let text = fs::read(index).map_err(Error::io("read", index))?;
    let spoiled = |problem: String| Error::invalid(index, problem, "the repository is broken; try another --revision");
    let Index { weight_map } = serde_json::from_slice(&text).map_err(|error| spoiled(error.to_string()))?;
    let names: BTreeSet<_> = weight_map.values().filter_map(|name| name.as_str()).collect();
    if let Some(name) = names.iter().find(|name| !is_plain_name(name)) {
        return Err(spoiled(format!("`weight_map` names a file outside the folder: {name:?}")));
    }
    Ok(names.into_iter().map(str::to_owned).collect())
}

/// A file to bring.
struct Item {
    name: String,
    url: String,
    to: PathBuf,
    size: Option<u64>,
    digest: Option<Digest>,
}

impl Item {
    fn beside(&self, suffix: &str) -> PathBuf {
        let mut path = self.to.clone().into_os_string();
        path.push(suffix);
        path.into()
    }

    fn wrong_size(&self, got: u64, want: u64) -> Error {
        Error::invalid(
            &self.to,
            format!("wrong size: the server sends {got} bytes where {want} are listed; nothing of it was kept"),
            "try again later; if HF_ENDPOINT names a mirror, try without",
        )
    }
}

/// Whether the file is there as it should be. Says so when it is there and is not.
fn is_right(item: &Item, progress: &mut dyn Progress) -> Result<bool> {
    let Some(size) = plain_file(&item.to)? else { return Ok(false) };
    let right = match &item.digest {
        _ if item.size.is_some_and(|expected| expected != size) => false,
        Some(digest) => {
            let mut file = File::open(&item.to).map_err(Error::io("read", &item.to))?;
            match Hasher::new(digest, Some(size)) {
                Some(mut hasher) => {
                    hasher.read(&mut file, size).map_err(Error::io("read", &item.to))? && hasher.matches()
                }
                None => false,
            }
        }
        None => item.size.is_some(),
    };
    if right {
        for leftover in [item.beside(".part"), item.beside(".part.etag")] {
            remove(&leftover)?;
        }
    } else {
        progress.note(&format!("`{}` is here, but is not what the repository has; fetching it anew", item.name));
    }
    Ok(right)
}

/// The size of the file at `path`, if there is one.
///
/// # Errors
/// Something that is not a file is there. Writing through a symbolic link could change a file far away.
fn plain_file(path: &Path) -> Result<Option<u64>> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_file() => Ok(Some(meta.len())),
        Ok(meta) => Err(Error::refused(
            format!("`{}` is {}", path.display(), if meta.is_symlink() { "a symbolic link" } else { "not a file" }),
            "move it out of the way, or download into another folder with --checkpoint_dir",
        )),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Lets one process at a time write into `dir`. Where folders cannot be locked (Windows, some network disks) there is
/// no lock, and two downloads at once end in a wrong hash.
fn wait_for_turn(dir: &Path, progress: &mut dyn Progress) -> Result<Option<File>> {
    let Ok(folder) = File::open(dir) else { return Ok(None) };
    match folder.try_lock() {
        Ok(()) => Ok(Some(folder)),
        Err(TryLockError::WouldBlock) => {
            progress.note(&format!("waiting for another download into `{}`", dir.display()));
            folder.lock().map_err(Error::io("lock", dir))?;
            Ok(Some(folder))
        }
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

/// A file on its way: `NAME.part`, and in `NAME.part.etag` what the bytes in it belong to.
///
/// The note is written before the first byte and removed after the last one, and a part is removed before its note
/// changes, so that no kill leaves bytes with a wrong note.
struct Part<'a> {
    item: &'a Item,
    file: File,
    have: u64,
    /// Known from the listing or from the first answer.
    size: Option<u64>,
    hasher: Option<Hasher>,
    /// The server's validator, where no hash is known beforehand.
    etag: Option<String>,
    /// Whether the bytes come from more than one request.
    resumed: bool,
}

impl<'a> Part<'a> {
    fn path(item: &Item) -> PathBuf {
        item.beside(".part")
    }

    /// The note of a part that can be gone on with.
    fn note(item: &Item) -> Result<Option<String>> {
        let path = item.beside(".part.etag");
        if plain_file(&Self::path(item))?.is_none() || plain_file(&path)?.is_none() {
            return Ok(None);
        }
        let note = fs::read_to_string(&path).unwrap_or_default();
        Ok(Some(note).filter(|note| match &item.digest {
            Some(digest) => note == digest.hex(),
            None => note.starts_with('"'),
        }))
    }

    fn kept_bytes(item: &Item) -> Result<u64> {
        let have = plain_file(&Self::path(item))?.unwrap_or(0);
        Ok(if Self::note(item)?.is_some() && item.size.is_none_or(|size| have <= size) { have } else { 0 })
    }

    fn open(item: &'a Item) -> Result<Self> {
        let path = Self::path(item);
        let have = Self::kept_bytes(item)?;
        let etag = Self::note(item)?.filter(|_| item.digest.is_none() && have > 0);
        if have == 0 {
            remove(&path)?;
            remove(&item.beside(".part.etag"))?;
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|error| write_failed(error, &path))?;
        let mut part = Self { item, file, have, size: item.size, hasher: None, etag, resumed: have > 0 };
        match &item.digest {
            Some(digest) => part.hash_with(digest)?,
            None => part.seek()?,
        }
        if have == 0
            && let Some(digest) = &item.digest
        {
            part.write_note(digest.hex())?;
        }
        Ok(part)
    }

    fn seek(&mut self) -> Result<()> {
        let have = SeekFrom::Start(self.have);
        self.file.seek(have).map(drop).map_err(Error::io("read", &Self::path(self.item)))
    }

    /// Begins to hash, with what is there already.
    fn hash_with(&mut self, digest: &Digest) -> Result<()> {
        if let Some(mut hasher) = Hasher::new(digest, self.size) {
            let read = self.file.rewind().and_then(|()| hasher.read(&mut self.file, self.have));
            read.map_err(Error::io("read", &Self::path(self.item)))?;
            self.hasher = Some(hasher);
        }
        self.seek()
    }

    fn write_note(&self, note: &str) -> Result<()> {
        let path = self.item.beside(".part.etag");
        fs::write(&path, note).map_err(|error| write_failed(error, &path))
    }

    /// Forgets the bytes.
    fn restart(&mut self) -> Result<()> {
        let path = Self::path(self.item);
        self.file.set_len(0).map_err(|error| write_failed(error, &path))?;
        (self.have, self.resumed) = (0, false);
        match &self.item.digest {
            Some(digest) => self.hash_with(digest),
            None => {
                (self.size, self.hasher, self.etag) = (self.item.size, None, None);
                remove(&self.item.beside(".part.etag"))?;
                self.seek()
            }
        }
    }

    /// Compares what the server is about to send with what is wanted, and learns from it what the listing does not say.
    fn expect(&mut self, answer: &Answer) -> Result<()> {
        for offered in [answer.total(), answer.linked.size].into_iter().flatten() {
            let size = *self.size.get_or_insert(offered);
            if size != offered {
                self.discard()?;
                return Err(self.item.wrong_size(offered, size));
            }
        }
        if self.hasher.is_none() {
            let linked = answer.linked.digest.as_deref();
            let linked = linked.and_then(|hex| Digest::sha256(hex).or_else(|| Digest::git_blob(hex)));
            if let Some(digest) = self.item.digest.as_ref().or(linked.as_ref()) {
                self.hash_with(digest)?;
            }
        }
        if self.item.digest.is_none() {
            // A weak validator does not promise the same bytes.
            self.etag = answer.header("etag").filter(|etag| etag.starts_with('"')).map(str::to_owned);
            if let (0, Some(etag)) = (self.have, &self.etag) {
                self.write_note(etag)?;
            }
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| write_failed(error, &Self::path(self.item)))?;
        self.have += bytes.len() as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.context.update(bytes);
        }
        Ok(())
    }

    fn is_right(&self) -> bool {
        self.hasher.as_ref().is_none_or(Hasher::matches)
    }

    fn discard(&self) -> Result<()> {
        remove(&Self::path(self.item))?;
        remove(&self.item.beside(".part.etag"))
    }

    fn wrong_hash(&self) -> Error {
        let problem = "wrong hash: the bytes are not those that the repository lists; they were deleted";
        match self.discard() {
            Err(error) => error,
            Ok(()) => Error::invalid(
                &self.item.to,
                problem,
                "run the same command again; if it stays, the disk, a proxy or the mirror in HF_ENDPOINT spoils data",
            ),
        }
    }

    fn finish(self) -> Result<()> {
        let (path, to) = (Self::path(self.item), &self.item.to);
        self.file.sync_all().map_err(|error| write_failed(error, &path))?;
        drop(self.file);
        fs::rename(&path, to).map_err(Error::io("rename", &path))?;
        if let Some(Ok(folder)) = to.parent().map(File::open) {
            let _ = folder.sync_all(); // Not every system can; the next run verifies anyhow.
        }
        remove(&self.item.beside(".part.etag"))
    }
}

/// A failure to write; a full disk gets the hint that fits a download.
fn write_failed(error: io::Error, path: &Path) -> Error {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Error::refused(
            format!("no space left for `{}`", path.display()),
            "free some space and run the same command again: it goes on where it stopped; or take another disk with \
             --checkpoint_dir",
        ),
        _ => Error::io("write", path)(error),
    }
}

/// Moves an answer's bytes into the part until there are as many as there should be.
fn copy(answer: Answer, part: &mut Part<'_>, progress: &mut dyn Progress) -> std::result::Result<(), Trouble> {
    let mut body = answer.response.into_body().into_reader();
    let mut buffer = vec![0; 128 << 10];
    loop {
        match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                part.write(&buffer[..n])?;
                progress.bytes(n as u64);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(Trouble::broken(format!("`{}`: the connection broke: {error}", part.item.name))),
        }
        if let Some(size) = part.size.filter(|&size| part.have > size) {
            part.discard()?;
            return Err(part.item.wrong_size(part.have, size).into());
        }
    }
    match part.size {
        Some(size) if part.have < size => {
            Err(Trouble::broken(format!("`{}`: the connection ended at byte {} of {size}", part.item.name, part.have)))
        }
        _ => Ok(()),
    }
}

/// What the Hub knows a file by, in lower-case hex.
enum Digest {
    /// Of the content; files in large-file storage.
    Sha256(String),
    /// SHA-1 of `blob SIZE\0` and the content; files in git.
    GitBlob(String),
}

impl Digest {
    fn sha256(hex: &str) -> Option<Self> {
        is_hex(hex, 64).then(|| Self::Sha256(hex.to_lowercase()))
    }

    fn git_blob(hex: &str) -> Option<Self> {
        is_hex(hex, 40).then(|| Self::GitBlob(hex.to_lowercase()))
    }

    fn hex(&self) -> &str {
        let (Self::Sha256(hex) | Self::GitBlob(hex)) = self;
        hex
    }
}

struct Hasher {
    context: digest::Context,
    expected: String,
}

impl Hasher {
    /// `None` where the kind of hash needs a size and there is none.
    fn new(digest: &Digest, size: Option<u64>) -> Option<Self> {
        let context = match digest {
            Digest::Sha256(_) => digest::Context::new(&digest::SHA256),
            Digest::GitBlob(_) => {
                let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {}\0", size?).as_bytes());
                context
            }
        };
        Some(Self { context, expected: digest.hex().to_owned() })
    }

    /// Takes `n` bytes of `file`; whether there were so many.
    fn read(&mut self, file: &mut File, n: u64) -> io::Result<bool> {
        let mut file = file.take(n);
        let mut buffer = vec![0; 1 << 20];
        let mut got = 0;
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(got == n),
                Ok(len) => {
                    self.context.update(&buffer[..len]);
                    got += len as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn matches(&self) -> bool {
        let digest = self.context.clone().finish();
        let hex = digest.as_ref().iter().flat_map(|byte| [byte >> 4, byte & 15]);
        hex.eq(self.expected.bytes().map(|c| char::from(c).to_digit(16).map_or(16, |digit| digit as u8)))
    }
}

/// What the Hub says of a file on the way to its bytes.
#[derive(Clone, Default)]
struct Linked {
    size: Option<u64>,
    digest: Option<String>,
}

struct Answer {
    response: ureq::http::Response<ureq::Body>,
    linked: Linked,
    /// Whether it is the endpoint's own, not the CDN's.
    at_home: bool,
}

impl Answer {
    fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    /// Size and hash by the endpoint's headers, kept from an earlier answer where this one is silent.
    fn linked(&self) -> Linked {
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
    fn range(&self) -> Option<(u64, Option<u64>)> {
        let (range, total) = self.header("content-range")?.strip_prefix("bytes ")?.split_once('/')?;
        Some((range.split_once('-')?.0.trim().parse().ok()?, total.trim().parse().ok()))
    }

    /// The size of the whole file.
    fn total(&self) -> Option<u64> {
        match self.status() {
            206 => self.range()?.1,
            _ if self.header("content-encoding").is_some_and(|encoding| encoding != "identity") => None,
            _ => self.header("content-length")?.trim().parse().ok(),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        let asked = self.header("retry-after").and_then(|after| after.trim().parse().ok());
        // `RateLimit: "api";r=0;t=55`, as the Hub says it.
        let reset =
            || self.header("ratelimit")?.split(';').find_map(|field| field.trim().strip_prefix("t=")?.parse().ok());
        asked.or_else(reset).map(Duration::from_secs)
    }
}

fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|c| c.is_ascii_hexdigit())
}

fn is_web_address(url: &str) -> bool {
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
    rest.is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/')) && url.chars().all(|c| c.is_ascii_graphic())
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    &url[..end]
}

/// Where a redirect leads.
fn join(url: &str, location: &str) -> Result<String> {
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
fn escape_path(name: &str) -> String {
    name.split('/').map(escape).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::model::families::FAMILIES;

    fn listing(names: &[&str]) -> Listing {
        let sibling = |name: &&str| Sibling { rfilename: (*name).to_owned(), size: Some(1), blob_id: None, lfs: None };
        Listing { sha: None, siblings: names.iter().map(sibling).collect() }
    }

    fn weights(names: &[&str]) -> Vec<String> {
        match listing(names).weights() {
            Some(Weights::Files(names)) => names,
            Some(Weights::Index(name)) => vec![format!("index {name}")],
            None => Vec::new(),
        }
    }

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
    fn weights_in_the_order_of_transformers() {
        assert_eq!(weights(&["pytorch_model.bin", "model.safetensors"]), ["model.safetensors"]);
        let sharded = ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "pytorch_model.bin"];
        assert_eq!(weights(&sharded), ["index model.safetensors.index.json"]);
        let others = ["consolidated.safetensors", "adapter_model.safetensors", "onnx/model.safetensors", "m.gguf"];
        assert!(weights(&others).is_empty());
        assert_eq!(weights(&["odd.safetensors", "training_args.bin"]), ["odd.safetensors"]);
        assert_eq!(weights(&["pytorch_model.bin.index.json"]), ["index pytorch_model.bin.index.json"]);
        assert_eq!(weights(&["pytorch_model-1.bin", "optimizer.bin"]), ["pytorch_model-1.bin"]);
    }

    #[test]
    fn only_needed_small_files() {
        let names = [
            "README.md",
            "chat_template.jinja",
            "config.json",
            "original/tokenizer.model",
            "tokenizer.model",
            "tokenizer_config.json",
            "training_args.bin",
            "USE_POLICY.md",
        ];
        let small = listing(&names).small_files();
        assert_eq!(small, ["chat_template.jinja", "config.json", "tokenizer.model", "tokenizer_config.json"]);
    }

    #[test]
    fn names_that_lead_out_are_refused() {
        for bad in
            ["../a", "a/../../b", "/etc/passwd", "tokenizer\\..\\x", "C:x", "..", "\\x", "tokenizer:x", "a\\..\\b"]
        {
            assert!(listing(&["config.json", bad]).checked("here").is_err(), "{bad}");
        }
        assert!(listing(&["onnx/model.onnx", "onnx\\model.onnx", "a..b"]).checked("here").is_ok());
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

    #[test]
    fn hashes_are_those_of_git_and_sha256sum() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hello");
        fs::write(&path, "hello\n").unwrap();
        for digest in [
            Digest::git_blob("ce013625030ba8dba906f756967f9e9ca394464a").unwrap(),
            Digest::sha256("5891B5B522D5DF086D0FF0B110FBD9D21BB4FC7163AF34D08286A2E846F6BE03").unwrap(),
        ] {
            let mut hasher = Hasher::new(&digest, Some(6)).unwrap();
            assert!(hasher.read(&mut File::open(&path).unwrap(), 6).unwrap());
            assert!(hasher.matches());
            hasher.context.update(b"x");
            assert!(!hasher.matches());
        }
    }

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
    fn a_full_disk_is_said_with_what_to_do() {
        let error = write_failed(io::Error::from(ErrorKind::StorageFull), Path::new("x.part"));
        assert_eq!(error.to_string(), "no space left for `x.part`");
        assert!(error.hint().unwrap().contains("goes on where it stopped"));
    }

    #[test]
    fn near_names_are_suggested_and_far_ones_not() {
        assert_eq!(nearest_model("qwen/qwen3-0.6b"), Some("Qwen/Qwen3-0.6B"));
        assert_eq!(nearest_model("meta/llama-3.2-1B"), Some("meta-llama/Llama-3.2-1B"));
        assert_eq!(nearest_model("microsoft/phi2"), Some("microsoft/phi-2"));
        assert_eq!(nearest_model("somebody/something-else"), None);
    }

    #[test]
    fn addresses_are_escaped() {
        assert_eq!(escape("tokenizer#1 ä.json"), "tokenizer%231%20%C3%A4.json");
    }
}
