//! Answers questions: from a request and the directory asked in to hits that the caller may see.

use std::time::{Duration, Instant};

use rustix::io::Errno;
use vexfs_store::index::{Effort, SearchError as GaveUp, Until};
use vexfs_store::{Answer, Content, FileId, Hit, MAX_K, Query, Verdict};

use crate::access::{Caller, Gate, Identity, Killed};
use crate::errors::{Failure, name};
use crate::ingest::{Ingest, Standing, When};
use crate::wire::{ATTACHED, ErrorLine, HitLine, Reply, Request};

/// Hits where a request doesn't say how many.
pub const DEFAULT_K: usize = 10;
/// A search's time where the request doesn't say.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time that a request may give itself.
const MAX_TIMEOUT_MS: u64 = 600_000;
/// Most candidates that a request may ask a walk to keep.
const MAX_EF: usize = 100_000;
/// A search that has to wait for a walk over the source does so in steps of this: so much past its deadline at most.
const WALK_STEP: Duration = Duration::from_millis(5);

/// See the module.
pub struct Service<'a> {
    /// Files and store.
    pub ingest: &'a Ingest,
    /// What callers may see.
    pub access: &'a Gate,
}

impl Service<'_> {
    /// Answers one line of the query file.
    pub fn answer_line(&self, scope: FileId, caller: Caller, killed: &Killed, line: &[u8]) -> Reply {
        let began = Instant::now();
        let result = serde_json::from_slice::<Request>(line)
            .map_err(|error| Failure::new(Errno::INVAL, format!("request: {error}")))
            .and_then(|request| self.answer(scope, caller, killed, &request));
        match result {
            Ok(answer) => Reply {
                hits: Some(answer.hits.into_iter().map(hit_line).collect()),
                took_us: Some(began.elapsed().as_micros() as u64),
                distances: (answer.distances > 0).then_some(answer.distances),
                error: None,
            },
            Err(failure) => Reply { error: Some(error_line(&failure)), ..Reply::default() },
        }
    }

    /// Answers a request asked in `scope`.
    pub fn answer(&self, scope: FileId, caller: Caller, killed: &Killed, request: &Request) -> Result<Answer, Failure> {
        let timeout = request.timeout_ms.map_or(DEFAULT_TIMEOUT, |ms| Duration::from_millis(ms.min(MAX_TIMEOUT_MS)));
        let deadline = Instant::now() + timeout;
        let cancelled = || killed.is_so();
        let until = Until { deadline: Some(deadline), cancelled: Some(&cancelled) };
        let invalid = |message: String| Failure::new(Errno::INVAL, message);
        let k = request.k.unwrap_or(DEFAULT_K);
        if k == 0 || k > MAX_K {
            return Err(invalid(format!("k is {k}; 1 to {MAX_K} can be asked for")));
        }
        let effort = match (request.ef, request.recall) {
            (Some(_), Some(_)) => return Err(invalid("ef and recall exclude each other".to_owned())),
            (Some(ef), None) if (1..=MAX_EF).contains(&ef) => Effort::Ef(ef),
            (Some(ef), None) => return Err(invalid(format!("ef is {ef}; 1 to {MAX_EF} can be asked for"))),
            (None, Some(recall)) if recall > 0.0 && recall <= 1.0 => Effort::Recall(recall),
            (None, Some(recall)) => {
                return Err(invalid(format!("recall is {recall}; it lies above 0 and at most at 1")));
            }
            (None, None) => Effort::default(),
        };
        if request.max_distance.is_some_and(f32::is_nan) {
            return Err(invalid("max_distance is not a number".to_owned()));
        }
        self.wait_for_scan(until)?;
        let (vector, exclude) = match (&request.vector, &request.like) {
            (Some(vector), None) => (vector.clone(), None),
            (None, Some(like)) => {
                let (file, row) = self.point(scope, caller, like)?;
                (self.vector(file, row, like)?, Some((file, row)))
            }
            _ => return Err(invalid("exactly one of vector and like is wanted".to_owned())),
        };
        let query = Query {
            vector,
            k,
            effort,
            exact: request.exact,
            max_distance: request.max_distance,
            scope,
            exclude,
            until,
        };
        let identity = self.access.identify(caller)?;
        let mut answer = self.judged(scope, &identity, until, |verdict| self.ingest.volume.search(&query, verdict))?;
        if let Identity::Other { .. } = identity {
            // It would tell how much there is that the asker can't see.
            answer.distances = 0;
        }
        Ok(answer)
    }

    /// What the point that `like` names is linked to in its graph, as far as it lies below `scope` and the caller
    /// may read it.
    pub fn neighbors(&self, scope: FileId, caller: Caller, like: &str) -> Result<Vec<Hit>, Failure> {
        let (deadline, killed) = (Instant::now() + DEFAULT_TIMEOUT, Killed::new(caller));
        let cancelled = || killed.is_so();
        let until = Until { deadline: Some(deadline), cancelled: Some(&cancelled) };
        self.wait_for_scan(until)?;
        let (file, row) = self.point(scope, caller, like)?;
        let identity = self.access.identify(caller)?;
        let neighbors = |verdict: &mut Verdict<'_>| self.ingest.volume.neighbors(file, row, scope, verdict);
        let found = self.judged(scope, &identity, until, neighbors);
        found.ok_or_else(|| self.no_vector(file, row, like))
    }

    /// Asks the store with the verdict on each file that the caller's rights and the source give. After a crash, or changes
    /// made while nothing was mounted, a file may have a name or vectors that only the walk finds: an answer that met a
    /// file which isn't where it was, or what it was, waits for the walk and is made again; so does any where a file that
    /// had to be read again was not where it was.
    fn judged<T>(
        &self,
        scope: FileId,
        identity: &Identity,
        until: Until<'_>,
        mut ask: impl FnMut(&mut Verdict<'_>) -> T,
    ) -> T {
        let scope_path = self.ingest.volume.dir_path(scope).unwrap_or_default();
        loop {
            let walked = self.ingest.walked();
            let mut stale = Vec::new();
            let mut outdated = !walked && self.ingest.lost_any();
            let answer = ask(&mut |file, path, known| {
                let path = join(&scope_path, path);
                let Some(found) = self.access.readable(identity, &path) else {
                    outdated |= !walked && self.ingest.source.stat(&path).is_err();
                    return false;
                };
                let standing = match file.is_attached() {
                    true => self.ingest.standing_attached(file, &path, &found, known),
                    false => self.ingest.standing(file, &found, known),
                };
                if matches!(standing, Standing::Changed | Standing::Aged) {
                    stale.push(file);
                }
                let stands = matches!(standing, Standing::Current | Standing::Aged);
                outdated |= !stands;
                stands
            });
            // What changed beneath us is read again now; the answer already left it out.
            for file in stale {
                self.ingest.read_known(file, When::Quiet);
            }
            if walked || !outdated || until.check().is_err() {
                return answer;
            }
            while !self.ingest.walked() && until.check().is_ok() {
                std::thread::sleep(WALK_STEP);
            }
        }
    }

    /// The point that `path`, `path#row` or `path#embedding` names, if the caller may read it. A path alone is the file's
    /// first row or, where it holds none, what is attached to it.
    pub fn point(&self, scope: FileId, caller: Caller, like: &str) -> Result<(FileId, u32), Failure> {
        let (base, relative) = match like.strip_prefix('/') {
            Some(rest) => (Vec::new(), rest),
            None => (self.ingest.volume.dir_path(scope).unwrap_or_default(), like),
        };
        let whole = join(&base, relative.as_bytes());
        let identity = self.access.identify(caller)?;
        // A name that the asker can't read is none: its `#` is taken for a row's.
        let (path, row) = match (self.access.readable(&identity, &whole), relative.rsplit_once('#')) {
            (None, Some((file, ATTACHED))) => (join(&base, file.as_bytes()), Place::Attached),
            (None, Some((file, row))) => {
                let row = row
                    .parse()
                    .map_err(|_| Failure::new(Errno::INVAL, format!("like: \"{row}\" is not a row number")))?;
                (join(&base, file.as_bytes()), Place::Row(row))
            }
            _ => (whole, Place::Any),
        };
        let absent = |errno: Errno| Failure::new(errno, format!("like: {like}: {}", std::io::Error::from(errno)));
        if path.split(|byte| *byte == b'/').any(|part| part == b".." || part == crate::walk::RESERVED.as_bytes()) {
            return Err(absent(Errno::NOENT));
        }
        let Some(stat) = self.access.readable(&identity, &path) else {
            // A stranger isn't told whether it is there.
            let there = identity == Identity::Own && self.ingest.source.stat(&path).is_ok();
            return Err(absent(if there { Errno::ACCESS } else { Errno::NOENT }));
        };
        let file = self.ingest.source.id(&stat).ok_or_else(|| absent(Errno::NODATA))?;
        Ok(match row {
            Place::Row(row) => (file, row),
            Place::Attached => (file.attached(), 0),
            Place::Any => {
                let holds = matches!(self.ingest.volume.content(file), Some((_, Content::Indexed { .. })));
                let attached = !holds && self.ingest.volume.has_attached(file);
                (if attached { file.attached() } else { file }, 0)
            }
        })
    }

    fn vector(&self, file: FileId, row: u32, like: &str) -> Result<Vec<f32>, Failure> {
        self.ingest.volume.vector(file, row).ok_or_else(|| self.no_vector(file, row, like))
    }

    fn no_vector(&self, file: FileId, row: u32, like: &str) -> Failure {
        let why = match self.ingest.volume.content(file) {
            Some((_, Content::Indexed { rows, .. })) => format!("there is no row {row}: the file has {rows}"),
            Some((_, Content::Refused { reason, .. })) => format!("not indexed: {reason}"),
            Some((_, Content::Unread)) => "not read yet".to_owned(),
            Some((_, Content::Empty)) | None => "holds no vector".to_owned(),
        };
        Failure::new(Errno::NODATA, format!("like: {like}: {why}"))
    }

    /// An answer before the first scan is over would leave out what is there.
    fn wait_for_scan(&self, until: Until<'_>) -> Result<(), Failure> {
        loop {
            let Err(scanning) = self.ingest.volume.ready() else { return Ok(()) };
            match until.check() {
                Ok(()) => std::thread::sleep(WALK_STEP),
                Err(GaveUp::Cancelled) => return Err(vexfs_store::SearchError::Cancelled.into()),
                Err(_) => return Err(scanning.into()),
            }
        }
    }
}

/// Which of a file's vectors.
enum Place {
    Row(u32),
    Attached,
    Any,
}

/// Joins two relative paths.
pub fn join(base: &[u8], path: &[u8]) -> Vec<u8> {
    match (base.is_empty(), path.is_empty()) {
        (true, _) => path.to_vec(),
        (_, true) => base.to_vec(),
        _ => [base, b"/", path].concat(),
    }
}

fn hit_line(hit: Hit) -> HitLine {
    let (path, path_bytes) = match String::from_utf8(hit.path) {
        Ok(path) => (path, None),
        Err(error) => (String::from_utf8_lossy(error.as_bytes()).into_owned(), Some(error.into_bytes())),
    };
    HitLine {
        path,
        path_bytes,
        row: hit.row,
        attached: hit.file.is_attached(),
        distance: hit.distance,
        score: hit.score,
    }
}

fn error_line(failure: &Failure) -> ErrorLine {
    ErrorLine { errno: failure.errno.raw_os_error(), code: name(failure.errno), message: failure.message.clone() }
}
