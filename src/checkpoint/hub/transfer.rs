//! Requests, redirects, tries and pauses: how bytes come here.

use std::io::{ErrorKind, Read};
use std::time::Duration;

use super::answer::{Answer, Linked, join, origin};
use super::part::{Item, Part, is_right};
use super::trouble::{Errand, Trouble, trouble_of};
use super::{Hub, Progress, STALL};
use crate::error::{Error, Result};

/// How often in a row a request may fail without one byte more on the disk.
const TRIES: u32 = 6;
/// How often the first request may fail to reach the server at all: whoever is offline should hear it soon.
const TRIES_TO_REACH: u32 = 2;
/// A server that asks for a longer pause than this is not waited for.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

impl Hub {
    /// What `url` gives, kept in memory.
    pub(super) fn read(
        &self,
        errand: &Errand<'_>,
        url: &str,
        limit_bytes: u64,
        progress: &mut dyn Progress,
    ) -> Result<Vec<u8>> {
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

    pub(super) fn bring_all(&self, errand: &Errand<'_>, items: &[Item], progress: &mut dyn Progress) -> Result<()> {
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

    pub(super) fn bring(&self, errand: &Errand<'_>, item: &Item, progress: &mut dyn Progress) -> Result<()> {
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

pub(super) fn agent(stall: Duration) -> ureq::Agent {
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
