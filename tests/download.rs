//! `checkpoint::hub` against a server on loopback that speaks the Hub's routes and fails by script.
//!
//! The server has two ports: the Hub itself, and the CDN to which the Hub redirects for large files. A `Fault` waits for
//! a request whose address contains `at` and then does its worst, `times` times.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use litgpt::checkpoint::hub::{Hub, Progress, Request};
use litgpt::error::{Error, Result};
use ring::digest;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const WEIGHTS: &str = "model.safetensors";
const CDN: &str = "/cdn/model.safetensors";

#[derive(Clone)]
enum What {
    /// This status with these headers and no content.
    Status(u16, &'static str),
    /// Ends the connection after so many bytes of content.
    Cut(usize),
    /// Falls silent after so many bytes of content.
    Hang(usize),
    /// Sends no length and ends after so many bytes, as if that were all.
    Unsized(usize),
    /// Ends the connection without an answer.
    Close,
    /// Changes one byte.
    Spoil,
    /// Sends content of another length.
    Offer(usize),
    /// Sends the whole file although a part was asked for.
    IgnoreRange,
    /// Sends a page in place of the file.
    Page(&'static str),
    /// Sends the content slowly.
    Slow,
}

struct Fault {
    at: &'static str,
    times: usize,
    what: What,
}

struct Served {
    name: String,
    bytes: Vec<u8>,
    large: bool,
}

/// A request as it came.
#[derive(Clone, Debug)]
struct Asked {
    path: String,
    headers: BTreeMap<String, String>,
}

#[derive(Default)]
struct State {
    cdn: String,
    files: Mutex<Vec<Served>>,
    faults: Mutex<Vec<Fault>>,
    log: Mutex<Vec<Asked>>,
    /// The token without which files are refused.
    gate: Mutex<Option<&'static str>>,
    /// List names only, as a simple mirror does.
    names_only: Mutex<bool>,
}

struct Server {
    hub: String,
    state: Arc<State>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Served {
    fn hash(&self) -> String {
        if self.large {
            return hex(digest::digest(&digest::SHA256, &self.bytes).as_ref());
        }
        let mut blob = format!("blob {}\0", self.bytes.len()).into_bytes();
        blob.extend(&self.bytes);
        hex(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &blob).as_ref())
    }

    fn listed(&self, names_only: bool) -> serde_json::Value {
        let (name, size) = (&self.name, self.bytes.len());
        match (names_only, self.large) {
            (true, _) => serde_json::json!({ "rfilename": name }),
            (_, true) => serde_json::json!({ "rfilename": name, "size": size, "blobId": "0".repeat(40),
                "lfs": { "sha256": self.hash(), "size": size, "pointerSize": 134 } }),
            (_, false) => serde_json::json!({ "rfilename": name, "size": size, "blobId": self.hash() }),
        }
    }
}

/// Bytes without a pattern, always the same.
fn noise(len: usize) -> Vec<u8> {
    let mut x = 88_172_645_463_325_252_u64;
    let next = |_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    (0..len).map(next).collect()
}

impl Server {
    fn new() -> Self {
        let (hub, cdn) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State { cdn: address(&cdn), ..State::default() });
        let server = Self { hub: address(&hub), state: Arc::clone(&state) };
        for listener in [hub, cdn] {
            let state = Arc::clone(&state);
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let state = Arc::clone(&state);
                    thread::spawn(move || state.answer(stream));
                }
            });
        }
        server.serve("README.md", b"read me", false);
        server.serve("config.json", b"{\"model_type\": \"llama\"}", false);
        server.serve("tokenizer.json", &noise(5_000), false);
        server.serve("chat_template.jinja", b"{{ messages }}", false);
        server.serve("original/consolidated.00.pth", b"large", true);
        server.serve(WEIGHTS, &noise(300_000), true);
        server
    }

    fn serve(&self, name: &str, bytes: &[u8], large: bool) {
        let mut files = self.state.files.lock().unwrap();
        files.retain(|file| file.name != name);
        files.push(Served { name: name.to_owned(), bytes: bytes.to_vec(), large });
    }

    fn withdraw(&self, name: &str) {
        self.state.files.lock().unwrap().retain(|file| file.name != name);
    }

    fn fail(&self, at: &'static str, times: usize, what: What) {
        self.state.faults.lock().unwrap().push(Fault { at, times, what });
    }

    fn asked(&self, at: &str) -> Vec<Asked> {
        self.state.log.lock().unwrap().iter().filter(|asked| asked.path.contains(at)).cloned().collect()
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        self.state.files.lock().unwrap().iter().find(|file| file.name == name).unwrap().bytes.clone()
    }
}

struct Reply {
    status: u16,
    headers: String,
    content: Vec<u8>,
}

impl State {
    fn answer(&self, stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let path = line.split(' ').nth(1)?.to_owned();
        let mut headers = BTreeMap::new();
        loop {
            line.clear();
            reader.read_line(&mut line).ok()?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.insert(name.to_lowercase(), value.trim().to_owned());
        }
        let mut asked = Asked { path, headers };
        self.log.lock().unwrap().push(asked.clone());
        let fault = self.fault(&asked.path);
        if matches!(fault, Some(What::IgnoreRange)) {
            asked.headers.remove("range");
        }
        let mut reply = self.route(&asked);
        match fault {
            Some(What::Close) => return None,
            Some(What::Status(status, headers)) => reply = Reply { status, headers: headers.into(), content: vec![] },
            Some(What::Spoil) => reply.content[1] ^= 1,
            Some(What::Offer(len)) => reply.content.resize(len, 0),
            Some(What::Page(page)) => reply = Reply { status: 200, headers: String::new(), content: page.into() },
            _ => {}
        }
        send(stream, &reply, fault.as_ref())
    }

    fn fault(&self, path: &str) -> Option<What> {
        let mut faults = self.faults.lock().unwrap();
        let fault = faults.iter_mut().find(|fault| fault.times > 0 && path.contains(fault.at))?;
        fault.times -= 1;
        Some(fault.what.clone())
    }

    fn route(&self, asked: &Asked) -> Reply {
        let reply = |status, headers: String, content| Reply { status, headers, content };
        let missing = |code: &str| reply(404, format!("X-Error-Code: {code}\r\n"), vec![]);
        let path = asked.path.split('?').next().unwrap();
        let files = self.files.lock().unwrap();
        let find = |name: &str| files.iter().find(|file| file.name == name);
        if let Some(revision) = path.strip_prefix("/api/models/org/name/revision/") {
            if !["main", "refs%2Fpr%2F1"].contains(&revision) {
                return missing("RevisionNotFound");
            }
            let names_only = *self.names_only.lock().unwrap();
            let siblings: Vec<_> = files.iter().map(|file| file.listed(names_only)).collect();
            return reply(
                200,
                String::new(),
                serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string().into(),
            );
        }
        if let Some(name) = path.strip_prefix(&format!("/org/name/resolve/{COMMIT}/")) {
            let Some(file) = find(name) else { return missing("EntryNotFound") };
            if let Some(token) = *self.gate.lock().unwrap()
                && asked.headers.get("authorization").is_none_or(|given| *given != format!("Bearer {token}"))
            {
                return reply(401, "X-Error-Code: GatedRepo\r\n".into(), vec![]);
            }
            let commit = format!("X-Repo-Commit: {COMMIT}\r\n");
            if !file.large {
                return part_of(file, asked, format!("{commit}ETag: \"{}\"\r\n", file.hash()));
            }
            let (cdn, hash, size) = (&self.cdn, file.hash(), file.bytes.len());
            let linked = format!("X-Linked-Etag: \"{hash}\"\r\nX-Linked-Size: {size}\r\n");
            return reply(302, format!("{commit}{linked}Location: {cdn}/cdn/{name}?signature=1\r\n"), b"Found".into());
        }
        match path.strip_prefix("/cdn/").and_then(find) {
            Some(file) => part_of(file, asked, format!("ETag: \"cdn-{}\"\r\n", &file.hash()[..8])),
            None => missing("RepoNotFound"),
        }
    }
}

/// The file, or what a `Range` asks of it.
fn part_of(file: &Served, asked: &Asked, headers: String) -> Reply {
    let same = asked.headers.get("if-range").is_none_or(|etag| headers.contains(etag));
    let range = asked.headers.get("range").filter(|_| same);
    let Some(start) = range.map(|range| range["bytes=".len()..].trim_end_matches('-').parse::<usize>().unwrap()) else {
        return Reply { status: 200, headers, content: file.bytes.clone() };
    };
    let len = file.bytes.len();
    if start >= len {
        return Reply { status: 416, headers, content: vec![] };
    }
    let headers = format!("{headers}Content-Range: bytes {start}-{}/{len}\r\n", len - 1);
    Reply { status: 206, headers, content: file.bytes[start..].to_vec() }
}

fn send(mut stream: TcpStream, reply: &Reply, fault: Option<&What>) -> Option<()> {
    let Reply { status, headers, content } = reply;
    let mut head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\n{headers}");
    if !matches!(fault, Some(What::Unsized(_))) {
        head += &format!("Content-Length: {}\r\n", content.len());
    }
    stream.write_all(format!("{head}\r\n").as_bytes()).ok()?;
    let len = match fault {
        Some(What::Cut(n) | What::Hang(n) | What::Unsized(n)) => (*n).min(content.len()),
        _ => content.len(),
    };
    for piece in content[..len].chunks(4096) {
        stream.write_all(piece).ok()?;
        if matches!(fault, Some(What::Slow)) {
            thread::sleep(Duration::from_millis(2));
        }
    }
    if matches!(fault, Some(What::Hang(_))) {
        thread::sleep(Duration::from_secs(3));
    }
    Some(())
}

/// Progress that checks itself: what a file had and got is its size when it is done.
#[derive(Default)]
struct Seen {
    open: Option<(String, u64, u64)>,
    done: Vec<String>,
    notes: Vec<String>,
    totals: Vec<(usize, u64, u64)>,
    calls: usize,
    /// The call that ends it all.
    stop_at: Option<usize>,
}

impl Seen {
    fn called(&mut self) {
        self.calls += 1;
        if Some(self.calls) == self.stop_at {
            resume_unwind(Box::new(()));
        }
    }
}

impl Progress for Seen {
    fn total(&mut self, files: usize, bytes: u64, have: u64) {
        self.totals.push((files, bytes, have));
        self.called();
    }
    fn file(&mut self, name: &str, size: u64, have: u64) {
        self.open = Some((name.to_owned(), size, have));
        self.called();
    }
    fn bytes(&mut self, n: u64) {
        self.open.as_mut().unwrap().2 += n;
        self.called();
    }
    fn done(&mut self, name: &str) {
        let (open, size, have) = self.open.take().unwrap();
        assert_eq!((open.as_str(), size), (name, have));
        self.done.push(open);
        self.called();
    }
    fn note(&mut self, line: &str) {
        assert!(!line.contains('\n'));
        self.notes.push(line.to_owned());
        self.called();
    }
}

/// A client, and the pauses it made.
struct Client {
    hub: Hub,
    pauses: Arc<Mutex<Vec<u64>>>,
    seen: Seen,
}

impl Client {
    fn new(server: &Server) -> Self {
        Self::at(&server.hub, None)
    }

    fn at(endpoint: &str, token: Option<&str>) -> Self {
        let pauses = Arc::new(Mutex::new(Vec::new()));
        let made = Arc::clone(&pauses);
        let hub = Hub::new(endpoint, token.map(str::to_owned)).unwrap().with_stall(Duration::from_millis(500));
        let hub = hub.with_sleep(move |pause| made.lock().unwrap().push(pause.as_secs()));
        Self { hub, pauses, seen: Seen::default() }
    }

    fn get(&mut self, into: &Path) -> Result<()> {
        let dir = self.hub.download(&request("org/name", into), &mut self.seen)?;
        assert_eq!(dir, into.join("org/name"));
        Ok(())
    }

    fn pauses(&self) -> Vec<u64> {
        self.pauses.lock().unwrap().clone()
    }
}

fn request<'a>(repo_id: &'a str, into: &'a Path) -> Request<'a> {
    Request { repo_id, revision: None, into, tokenizer_only: false }
}

fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// All needed files are there with the server's bytes, and nothing else is.
fn assert_complete(server: &Server, into: &Path) {
    let dir = into.join("org/name");
    assert_eq!(names(&dir), ["chat_template.jinja", "config.json", WEIGHTS, "tokenizer.json"]);
    assert_right(server, &dir);
}

/// Whatever has its own name has the server's bytes.
fn assert_right(server: &Server, dir: &Path) {
    for name in names(dir).iter().filter(|name| !name.contains(".part")) {
        assert!(fs::read(dir.join(name)).unwrap() == server.bytes(name), "{name}");
    }
}

/// An error in one line, with its hint.
fn text(error: &Error) -> String {
    let text = format!("{error} / {}", error.hint().unwrap_or_default());
    assert!(!text.contains('\n'), "{text}");
    text
}

#[track_caller]
fn assert_says(error: &Error, parts: &[&str]) {
    let text = text(error);
    assert!(parts.iter().all(|part| text.contains(part)), "{text}: {parts:?}");
}

fn ends_well(server: &Server) -> Client {
    let into = tempfile::tempdir().unwrap();
    let mut client = Client::new(server);
    client.get(into.path()).unwrap();
    assert_complete(server, into.path());
    client
}

fn ends_badly(server: &Server, parts: &[&str]) -> Client {
    let into = tempfile::tempdir().unwrap();
    let mut client = Client::new(server);
    let error = client.get(into.path()).unwrap_err();
    assert_says(&error, parts);
    assert_right(server, &into.path().join("org/name"));
    client
}

#[test]
fn brings_what_is_needed_and_asks_for_nothing_twice() {
    let (server, into) = (Server::new(), tempfile::tempdir().unwrap());
    let mut client = Client::at(&server.hub, Some("hf_secret"));
    client.get(into.path()).unwrap();
    assert_complete(&server, into.path());
    let needed = [WEIGHTS, "tokenizer.json", "chat_template.jinja", "config.json"];
    let bytes = needed.iter().map(|name| server.bytes(name).len() as u64).sum();
    assert_eq!(client.seen.totals, [(4, bytes, 0)]);
    assert_eq!(client.seen.done.last().unwrap(), "config.json");
    assert_eq!(server.asked("README").len() + server.asked("original").len(), 0);
    assert!(server.asked("/cdn/").iter().all(|asked| !asked.headers.contains_key("authorization")));
    assert!(server.asked("/resolve/").iter().all(|asked| asked.headers["authorization"] == "Bearer hf_secret"));

    let before = server.asked("").len();
    client.seen = Seen::default();
    client.get(into.path()).unwrap();
    assert_eq!(server.asked("").len(), before + 1, "only the listing is asked for again");
    assert_eq!(client.seen.totals, [(4, bytes, bytes)]);
    assert!(client.seen.notes.is_empty() && client.pauses().is_empty());
}

#[test]
fn revision_and_tokenizer_only() {
    let (server, into) = (Server::new(), tempfile::tempdir().unwrap());
    let mut client = Client::new(&server);
    let wanted = Request { revision: Some("refs/pr/1"), tokenizer_only: true, ..request("org/name", into.path()) };
    client.hub.download(&wanted, &mut client.seen).unwrap();
    assert_eq!(names(&into.path().join("org/name")), ["chat_template.jinja", "config.json", "tokenizer.json"]);
    assert_eq!(server.asked("refs%2Fpr%2F1").len(), 1);
    for (revision, part) in [("nope", "revision of `org/name` not found: `nope`"), ("a b", "not a revision")] {
        let wanted = Request { revision: Some(revision), ..wanted };
        assert_says(&client.hub.download(&wanted, &mut client.seen).unwrap_err(), &[part]);
    }
}

#[test]
fn an_index_says_which_weights() {
    let server = Server::new();
    server.withdraw(WEIGHTS);
    let index = r#"{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}"#;
    server.serve("model.safetensors.index.json", index.as_bytes(), false);
    server.serve("model-1-of-2.safetensors", b"one", true);
    server.serve("model-2-of-2.safetensors", b"two", true);
    server.serve("model-old.safetensors", b"old", true);
    server.serve("pytorch_model.bin", b"pickle", true);
    let into = tempfile::tempdir().unwrap();
    let mut client = Client::new(&server);
    client.get(into.path()).unwrap();
    let dir = into.path().join("org/name");
    let weights = ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"];
    assert_eq!(names(&dir).into_iter().filter(|name| name.contains("model")).collect::<Vec<_>>(), weights);
    assert_right(&server, &dir);
    assert_eq!(client.seen.totals[0].0, 6);

    server.withdraw("model-2-of-2.safetensors");
    ends_badly(&server, &["has no file `model-2-of-2.safetensors`"]);
    server.serve("model.safetensors.index.json", br#"{"weight_map": {"a": "../x"}}"#, false);
    ends_badly(&server, &["outside the folder"]);
}

#[test]
fn pickles_where_there_is_nothing_better() {
    let server = Server::new();
    server.withdraw(WEIGHTS);
    ends_badly(&server, &["without *.safetensors", "--tokenizer_only"]);
    server.serve("pytorch_model.bin", b"pickle", true);
    let into = tempfile::tempdir().unwrap();
    Client::new(&server).get(into.path()).unwrap();
    assert_eq!(fs::read(into.path().join("org/name/pytorch_model.bin")).unwrap(), b"pickle");
}

#[test]
fn a_broken_connection_is_resumed() {
    let server = Server::new();
    server.fail(CDN, 1, What::Cut(100_000));
    server.fail("tokenizer.json", 1, What::Cut(3_000));
    let client = ends_well(&server);
    let ranges: Vec<_> = server.asked(CDN).iter().map(|asked| asked.headers.get("range").cloned()).collect();
    assert_eq!(ranges, [None, Some("bytes=100000-".to_owned())]);
    assert_eq!(server.asked("tokenizer.json")[1].headers["range"], "bytes=3000-");
    assert_eq!(client.pauses(), [1, 1]);
    assert!(client.seen.notes[0].contains("trying again in 1 s"), "{:?}", client.seen.notes);
}

#[test]
fn breaks_that_leave_some_bytes_may_be_many() {
    let server = Server::new();
    server.fail(CDN, 20, What::Cut(10_000));
    assert_eq!(ends_well(&server).pauses(), [1; 20]);
}

#[test]
fn a_silent_connection_counts_as_broken() {
    let server = Server::new();
    server.fail(CDN, 1, What::Hang(50_000));
    server.fail("/api/", 1, What::Hang(10));
    assert_eq!(ends_well(&server).pauses(), [1, 1]);
    assert_eq!(server.asked(CDN)[1].headers["range"], "bytes=50000-");
}

#[test]
fn no_answer_and_server_failures_are_tried_again_with_growing_pauses() {
    let server = Server::new();
    server.fail("/api/", 2, What::Close);
    server.fail(CDN, 1, What::Status(503, ""));
    server.fail(CDN, 1, What::Status(500, ""));
    server.fail(CDN, 1, What::Unsized(0));
    assert_eq!(ends_well(&server).pauses(), [1, 2, 1, 2, 4]);
}

#[test]
fn content_that_ends_early_without_a_length_is_not_taken_for_whole() {
    let server = Server::new();
    server.fail(CDN, 1, What::Unsized(70_000));
    ends_well(&server);
    assert_eq!(server.asked(CDN)[1].headers["range"], "bytes=70000-");
}

#[test]
fn the_pause_is_the_one_that_the_server_asks_for() {
    let server = Server::new();
    server.fail("/api/", 1, What::Status(429, "Retry-After: 7\r\n"));
    server.fail("/resolve/", 1, What::Status(429, "RateLimit: \"resolvers\";r=0;t=55\r\n"));
    server.fail(CDN, 1, What::Status(503, "Retry-After: 2\r\n"));
    let mut pauses = ends_well(&server).pauses();
    pauses.sort_unstable();
    assert_eq!(pauses, [2, 7, 55]);
    server.fail("/api/", 1, What::Status(429, "Retry-After: 4000\r\n"));
    let client = ends_badly(&server, &["too many requests (429), asking to wait 4000 s", "--access_token"]);
    assert!(client.pauses().is_empty());
}

#[test]
fn a_server_that_stays_broken_is_given_up_and_the_part_is_kept() {
    let (server, into) = (Server::new(), tempfile::tempdir().unwrap());
    server.fail(CDN, 1, What::Cut(100_000));
    server.fail(CDN, 6, What::Status(502, ""));
    let mut client = Client::new(&server);
    let error = client.get(into.path()).unwrap_err();
    assert_says(&error, &["(502), 6 times", "run the same command again"]);
    assert_eq!(client.pauses(), [1, 2, 4, 8, 16]);
    client.seen = Seen::default();
    client.get(into.path()).unwrap();
    assert_complete(&server, into.path());
    assert_eq!(server.asked(CDN).last().unwrap().headers["range"], "bytes=100000-");
    assert!(client.seen.totals[0].2 >= 100_000);
}

#[test]
fn a_server_without_ranges_starts_over() {
    let server = Server::new();
    server.fail(CDN, 1, What::Cut(100_000));
    server.fail(CDN, 1, What::IgnoreRange);
    ends_well(&server);
    server.fail(CDN, 1, What::Cut(100_000));
    server.fail(CDN, 1, What::Status(416, ""));
    ends_well(&server);
    server.fail(CDN, 1, What::Cut(100_000));
    server.fail(CDN, 1, What::Status(206, "Content-Range: bytes 5-9/300000\r\n"));
    let notes = ends_well(&server).seen.notes;
    assert!(notes.iter().any(|note| note.contains("does not go on where the part ends")), "{notes:?}");
}

#[test]
fn a_server_that_always_breaks_and_never_resumes_is_given_up() {
    let server = Server::new();
    for _ in 0..20 {
        server.fail(CDN, 1, What::Cut(100_000));
        server.fail(CDN, 1, What::Status(416, ""));
    }
    assert!(ends_badly(&server, &["6 times"]).pauses().len() <= 6);
}

#[test]
fn a_wrong_size_is_an_error_and_nothing_is_kept() {
    for (at, len) in [(CDN, 299_999), (CDN, 300_001), ("/tokenizer.json", 10)] {
        let (server, into) = (Server::new(), tempfile::tempdir().unwrap());
        server.fail(at, 1, What::Offer(len));
        let mut client = Client::new(&server);
        let error = client.get(into.path()).unwrap_err();
        assert_says(&error, &["wrong size", &format!("sends {len} bytes"), "HF_ENDPOINT"]);
        assert!(names(&into.path().join("org/name")).iter().all(|name| !name.contains(".part")));
        client.get(into.path()).unwrap();
        assert_complete(&server, into.path());
    }
    let server = Server::new();
    // The Hub contradicts its own listing.
    let headers = "X-Linked-Size: 5\r\nLocation: /cdn/model.safetensors\r\n";
    server.fail("/resolve/0123456789abcdef0123456789abcdef01234567/model", 1, What::Status(302, headers));
    ends_badly(&server, &["wrong size", "5 bytes", "300000"]);
}

#[test]
fn a_wrong_hash_is_an_error_and_the_bytes_are_deleted() {
    for at in [CDN, "/tokenizer.json"] {
        let (server, into) = (Server::new(), tempfile::tempdir().unwrap());
        server.fail(at, 1, What::Spoil);
        let mut client = Client::new(&server);
        let error = client.get(into.path()).unwrap_err();
        assert_says(&error, &["wrong hash", "they were deleted"]);
        assert!(names(&into.path().join("org/name")).iter().all(|name| !name.contains(".part")));
        client.get(into.path()).unwrap();
        assert_complete(&server, into.path());
    }
}

#[test]
fn no_access_says_where_the_licence_is() {
    let server = Server::new();
    *server.state.gate.lock().unwrap() = Some("hf_good");
    ends_badly(&server, &["gated", "accept the licence at http://127", "--access_token or HF_TOKEN"]);
    let into = tempfile::tempdir().unwrap();
    let error = Client::at(&server.hub, Some("hf_other")).get(into.path()).unwrap_err();
    assert_says(&error, &["gated", "the account of the token of --access_token"]);
    assert!(!text(&error).contains("hf_other"));
    Client::at(&server.hub, Some("hf_good")).get(into.path()).unwrap();
    assert_complete(&server, into.path());

    server.fail("/resolve/", 1, What::Status(403, ""));
    ends_badly(&server, &["no access to `org/name` (403)"]);
    server.fail("/api/", 1, What::Status(401, "X-Error-Message: Invalid credentials in Authorization header\r\n"));
    let error = Client::at(&server.hub, Some("hf_old")).get(into.path()).unwrap_err();
    assert_says(&error, &["the access token of --access_token is not valid", "/settings/tokens"]);
}

#[test]
fn what_does_not_exist_is_said_with_a_near_name() {
    let (server, into) = (Server::new(), tempfile::tempdir().unwrap());
    let mut client = Client::new(&server);
    let error = client.hub.download(&request("qwen/Qwen3-0.6", into.path()), &mut client.seen).unwrap_err();
    assert_says(&error, &["not found: `qwen/Qwen3-0.6`", "did you mean `Qwen/Qwen3-0.6B`?"]);
    server.fail("/api/", 1, What::Status(401, "X-Error-Code: RepoNotFound\r\n"));
    ends_badly(&server, &["not found: `org/name`", "`litgpt download list`", "private"]);
    for bad in ["gpt2", "../..", "a/b/c"] {
        let error = client.hub.download(&request(bad, into.path()), &mut client.seen).unwrap_err();
        assert!(matches!(error, Error::Usage { .. }), "{bad}");
    }
    server.fail("tokenizer.json", 1, What::Status(404, "X-Error-Code: EntryNotFound\r\n"));
    ends_badly(&server, &["file of `org/name` not found"]);
    let left: Vec<String> = names(into.path());
    assert!(left.is_empty(), "no folder for what does not exist: {left:?}");
}

#[test]
fn offline_says_so_soon() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port(); // Closed again here.
    let into = tempfile::tempdir().unwrap();
    let mut client = Client::at(&format!("http://127.0.0.1:{port}"), None);
    let error = client.get(into.path()).unwrap_err();
    let by_hand = format!("by hand into `{}`", into.path().join("org/name").display());
    assert_says(&error, &["no connection to `http://127.0.0.1", "HF_ENDPOINT", &by_hand]);
    assert_eq!(client.pauses(), [1]);
}

#[test]
fn other_answers_are_not_taken_for_the_hub() {
    let server = Server::new();
    server.fail("/api/", 1, What::Page("<html>please log in</html>"));
    ends_badly(&server, &["does not answer like the Hugging Face Hub", "login page"]);
    server.fail(CDN, 1, What::Page("<html>please log in</html>"));
    ends_badly(&server, &["wrong size"]);
    server.fail("/api/", 1, What::Status(418, ""));
    ends_badly(&server, &["answers 418"]);
    server.fail("/api/", 1000, What::Status(302, "Location: /api/again\r\n"));
    ends_badly(&server, &["too many redirects"]);
}

#[test]
fn an_expired_address_of_the_cdn_is_asked_for_anew() {
    let server = Server::new();
    server.fail(CDN, 1, What::Status(403, ""));
    ends_well(&server);
    assert_eq!(server.asked("/resolve/0123456789abcdef0123456789abcdef01234567/model").len(), 2);
}

#[test]
fn names_never_lead_out_of_the_folder() {
    for bad in ["../config.json", "/etc/config.json", "tokenizer\\..\\..\\x", "C:\\x", "tokenizer\n.json"] {
        let server = Server::new();
        server.serve(bad, b"bad", false);
        ends_badly(&server, &["outside its folder", "nothing was written"]);
    }
}

#[cfg(unix)]
#[test]
fn symbolic_links_are_not_written_through() {
    for name in [WEIGHTS, "model.safetensors.part", "config.json"] {
        let (server, into) = (Server::new(), tempfile::tempdir().unwrap());
        let (dir, victim) = (into.path().join("org/name"), into.path().join("victim"));
        fs::create_dir_all(&dir).unwrap();
        fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, dir.join(name)).unwrap();
        let error = Client::new(&server).get(into.path()).unwrap_err();
        assert_says(&error, &["is a symbolic link", "--checkpoint_dir"]);
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
    }
}

#[test]
fn what_is_there_is_verified() {
    let (server, into) = (Server::new(), tempfile::tempdir().unwrap());
    Client::new(&server).get(into.path()).unwrap();
    let dir = into.path().join("org/name");
    let mut spoiled = server.bytes(WEIGHTS);
    spoiled[299_999] ^= 1;
    fs::write(dir.join(WEIGHTS), spoiled).unwrap();
    fs::write(dir.join("config.json"), "{").unwrap();
    let mut client = Client::new(&server);
    client.get(into.path()).unwrap();
    assert_complete(&server, into.path());
    assert_eq!(client.seen.notes.len(), 2, "{:?}", client.seen.notes);
    assert_eq!(server.asked("/resolve/").len(), 4 + 2);
}

#[test]
fn parts_of_before_are_used_only_where_they_fit() {
    let server = Server::new();
    let (bytes, hash) = (server.bytes(WEIGHTS), server.state.files.lock().unwrap().last().unwrap().hash());
    let mut spoiled = bytes[..1000].to_vec();
    spoiled[0] ^= 1;
    let longer = [&bytes[..], b"x"].concat();
    let none: &[u8] = b"";
    for (part, note, range) in [
        (&bytes[..1000], hash.as_str(), Some("bytes=1000-")),
        (&bytes[..1000], "0000", None),
        (&bytes[..1000], "", None),
        (&bytes[..], hash.as_str(), Some("not asked")),
        (&longer[..], hash.as_str(), None),
        (none, hash.as_str(), None),
        (&spoiled[..], hash.as_str(), Some("bytes=1000-")),
    ] {
        let into = tempfile::tempdir().unwrap();
        let dir = into.path().join("org/name");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("model.safetensors.part"), part).unwrap();
        fs::write(dir.join("model.safetensors.part.etag"), note).unwrap();
        server.state.log.lock().unwrap().clear();
        Client::new(&server).get(into.path()).unwrap();
        assert_complete(&server, into.path());
        let asked = server.asked(CDN);
        let first = asked.first().map_or(Some("not asked"), |asked| asked.headers.get("range").map(String::as_str));
        assert_eq!(first, range, "{} bytes, note {note:?}", part.len());
    }
}

#[test]
fn a_changed_repository_replaces_old_files() {
    let (server, into) = (Server::new(), tempfile::tempdir().unwrap());
    Client::new(&server).get(into.path()).unwrap();
    server.serve(WEIGHTS, &noise(200_000), true);
    server.fail(CDN, 1, What::Cut(50_000));
    Client::new(&server).get(into.path()).unwrap();
    assert_complete(&server, into.path());
}

#[test]
fn a_mirror_that_lists_only_names_is_verified_by_headers() {
    let server = Server::new();
    *server.state.names_only.lock().unwrap() = true;
    server.fail(CDN, 1, What::Cut(100_000));
    ends_well(&server);
    assert_eq!(server.asked(CDN)[1].headers["range"], "bytes=100000-");
    server.fail("/tokenizer.json", 1, What::Spoil);
    ends_badly(&server, &["wrong hash"]);
    server.fail(CDN, 1, What::Spoil);
    ends_badly(&server, &["wrong hash"]);
}

#[test]
fn two_downloads_at_once_fetch_once() {
    let (server, into) = (Server::new(), tempfile::tempdir().unwrap());
    server.fail(CDN, 1, What::Slow);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| Client::new(&server).get(into.path()).unwrap());
        }
    });
    assert_complete(&server, into.path());
    assert_eq!(server.asked(CDN).len(), 1);
}

#[test]
fn one_file_of_any_server() {
    let (server, into) = (Server::new(), tempfile::tempdir().unwrap());
    let (url, to) = (format!("{}/cdn/model.safetensors", server.state.cdn), into.path().join("data/set.json"));
    server.fail(CDN, 1, What::Cut(100_000));
    let mut client = Client::new(&server);
    client.hub.fetch_url(&url, &to, &mut client.seen).unwrap();
    assert!(fs::read(&to).unwrap() == server.bytes(WEIGHTS));
    assert_eq!(names(to.parent().unwrap()), ["set.json"]);
    let resumed = &server.asked(CDN)[1].headers;
    assert_eq!(resumed["range"], "bytes=100000-");
    assert!(resumed["if-range"].starts_with("\"cdn-"));

    client.hub.fetch_url(&url, &to, &mut client.seen).unwrap();
    assert_eq!(server.asked(CDN).len(), 2, "what is there is kept");
    let missing = client.hub.fetch_url(&format!("{}/cdn/no", server.hub), &into.path().join("no"), &mut client.seen);
    assert_says(&missing.unwrap_err(), &["file on the web not found", "check the address"]);
    let error = client.hub.fetch_url("ftp://x/y", &to, &mut client.seen).unwrap_err();
    assert!(matches!(error, Error::Usage { .. }));
}

#[test]
fn a_file_that_changed_on_the_server_is_not_patched_together() {
    let (server, into) = (Server::new(), tempfile::tempdir().unwrap());
    let (url, to) = (format!("{}/cdn/model.safetensors", server.state.cdn), into.path().join("set.json"));
    server.fail(CDN, 1, What::Cut(100_000));
    server.fail(CDN, 6, What::Status(500, ""));
    let mut client = Client::new(&server);
    client.hub.fetch_url(&url, &to, &mut client.seen).unwrap_err();
    assert_eq!(fs::metadata(into.path().join("set.json.part")).unwrap().len(), 100_000);
    server.serve(WEIGHTS, &[7; 250_000], true);
    client.hub.fetch_url(&url, &to, &mut client.seen).unwrap();
    assert!(fs::read(&to).unwrap() == vec![7; 250_000]);
    assert!(server.asked(CDN).last().unwrap().headers.contains_key("if-range"));
}

#[test]
fn stopped_at_any_step_it_goes_on() {
    let (server, into) = (Server::new(), tempfile::tempdir().unwrap());
    for step in 1.. {
        let into_one = tempfile::tempdir().unwrap();
        let stop = |into: &Path, step| {
            let mut client = Client::new(&server);
            client.seen.stop_at = Some(step);
            let stopped = catch_unwind(AssertUnwindSafe(|| client.get(into).unwrap())).is_err();
            assert_right(&server, &into.join("org/name"));
            stopped
        };
        stop(into.path(), 1 + step % 5); // Stopped again and again.
        let stopped = stop(into_one.path(), step); // Stopped once.
        Client::new(&server).get(into_one.path()).unwrap();
        assert_complete(&server, into_one.path());
        if !stopped {
            assert!(step > 10);
            break;
        }
    }
    Client::new(&server).get(into.path()).unwrap();
    assert_complete(&server, into.path());
}

/// The child is this test itself, told by the environment what to do.
#[test]
fn killed_at_any_time_it_goes_on() {
    const TASK: &str = "LITGPT_TEST_DOWNLOAD";
    if let Ok(task) = std::env::var(TASK) {
        let (endpoint, into) = task.split_once(' ').unwrap();
        Client::at(endpoint, None).get(Path::new(into)).unwrap();
        return;
    }
    let module = module_path!().split_once("::").unwrap().1;
    let (server, into) = (Server::new(), tempfile::tempdir().unwrap());
    server.fail(CDN, usize::MAX, What::Slow);
    for round in 0..12 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([&format!("{module}::killed_at_any_time_it_goes_on"), "--exact"])
            .env(TASK, format!("{} {}", server.hub, into.path().display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(10 + 9 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_right(&server, &into.path().join("org/name"));
    }
    assert!(server.asked("/api/").len() > 1, "the children worked");
    Client::new(&server).get(into.path()).unwrap();
    assert_complete(&server, into.path());
    assert!(server.asked(CDN).iter().any(|asked| asked.headers.contains_key("range")), "and later ones went on");
}
