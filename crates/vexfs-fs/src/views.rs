//! The virtual side: `.vexfs` in every directory, with the query file, statistics and ranked links.
//!
//! ```text
//! DIR/.vexfs/query                  requests in, answers out (see the module wire)
//! DIR/.vexfs/stats.json             the state of DIR and below
//! DIR/.vexfs/control                commands to the volume (see the module control)
//! DIR/.vexfs/similar/NAME[#ROW][?k=20&recall=0.99]/
//! DIR/.vexfs/neighbors/NAME[#ROW]/
//! ```
//!
//! A node is made by its lookup and goes with its last forget. A listing is what was found when the directory was
//! looked up or last listed from its start.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};
use rustix::io::Errno;
use vexfs_store::{Content, FileId, Hit};

use crate::access::{Caller, Gate, Identity, Killed};
use crate::control::obey;
use crate::errors::{Failure, name};
use crate::events::place;
use crate::formats::Format;
use crate::handling;
use crate::ingest::Ingest;
use crate::nodes::{Nodes, VIRTUAL_BASE};
use crate::service::{Service, join};
use crate::walk::RESERVED;
use crate::wire::{ATTACHED, Request};

/// Longest request line, and most bytes of answers that wait to be read, of one open query file.
const MAX_BUFFER: usize = 64 << 20;

/// What a virtual node is to the kernel.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Dir,
    /// A file.
    File,
    /// A symlink.
    Link,
}

/// Attributes of a virtual node.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct VirtualAttr {
    /// Its number, from [`VIRTUAL_BASE`] on.
    pub id: u64,
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u16,
    /// Bytes; of a symlink its target's.
    pub size: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum What {
    /// `.vexfs` of a directory.
    Top(FileId),
    Query(FileId),
    Stats(FileId),
    Control,
    Similar(FileId),
    /// `similar/NAME`, with NAME as it was asked for.
    Ranked(FileId, OsString),
    Neighbors(FileId),
    /// `neighbors/NAME`.
    Linked(FileId, OsString),
    /// A ranked link and its target.
    Hit(OsString),
}

/// An entry of a virtual directory.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its name.
    pub name: OsString,
    what: What,
}

impl Listed {
    /// What it is.
    pub fn kind(&self) -> Kind {
        attr_of(0, &self.what).kind
    }
}

struct Virtual {
    what: What,
    lookups: u64,
}

#[derive(Default)]
struct Table {
    by_id: HashMap<u64, Virtual>,
    by_what: HashMap<What, u64>,
    next: u64,
}

/// An open virtual file.
enum Open {
    Text(Vec<u8>),
    Control,
    Query { scope: FileId, request: Vec<u8>, answer: Vec<u8>, taken: usize },
}

/// What the volume is, as far as the mount and not the store knows it.
#[derive(Clone, Debug, Default)]
pub struct MountFacts {
    /// Where it is mounted.
    pub mountpoint: String,
    /// The source directory.
    pub source: String,
    /// The state directory.
    pub state: String,
    /// `close(2)` fails for files that can't be indexed.
    pub strict: bool,
}

/// See the module.
pub struct Views {
    ingest: Arc<Ingest>,
    access: Gate,
    nodes: Arc<Nodes>,
    facts: MountFacts,
    /// `passthrough` or `page cache`; decided at the first open.
    pub io: Mutex<&'static str>,
    /// Files that the kernel has a backing file of.
    pub backed: Arc<AtomicUsize>,
    table: Mutex<Table>,
    open: RwLock<HashMap<u64, Arc<Mutex<Open>>>>,
    next_handle: Mutex<u64>,
    /// Held while a command is done that takes long.
    command: Mutex<()>,
}

impl Views {
    /// Over a volume.
    pub fn new(ingest: Arc<Ingest>, access: Gate, nodes: Arc<Nodes>, facts: MountFacts) -> Views {
        Views {
            ingest,
            access,
            nodes,
            facts,
            io: Mutex::new("undecided"),
            backed: Arc::default(),
            table: Mutex::default(),
            open: RwLock::default(),
            next_handle: Mutex::new(0),
            command: Mutex::new(()),
        }
    }

    fn service(&self) -> Service<'_> {
        Service { ingest: &self.ingest, access: &self.access }
    }

    fn what(&self, id: u64) -> Result<What, Errno> {
        self.table.lock().by_id.get(&id).map(|node| node.what.clone()).ok_or(Errno::STALE)
    }

    fn enter(&self, what: What) -> VirtualAttr {
        let mut table = self.table.lock();
        let id = match table.by_what.get(&what) {
            Some(id) => *id,
            None => {
                table.next += 1;
                let id = VIRTUAL_BASE + table.next;
                table.by_what.insert(what.clone(), id);
                table.by_id.insert(id, Virtual { what: what.clone(), lookups: 0 });
                id
            }
        };
        if let Some(node) = table.by_id.get_mut(&id) {
            node.lookups += 1;
        }
        attr_of(id, &what)
    }

    /// Looks a name up: `.vexfs` in a real directory, anything in a virtual one.
    pub fn lookup(&self, caller: Caller, parent: u64, asked: &OsStr) -> Result<VirtualAttr, Errno> {
        if parent < VIRTUAL_BASE {
            let dir = self.nodes.get(parent)?;
            if asked != RESERVED || !dir.is_dir() {
                return Err(Errno::NOENT);
            }
            place(&self.ingest.volume, &self.nodes, FileId(parent));
            return Ok(self.enter(What::Top(FileId(parent))));
        }
        let what = match (self.what(parent)?, asked.as_bytes()) {
            (What::Top(dir), b"query") => What::Query(dir),
            (What::Top(dir), b"stats.json") => What::Stats(dir),
            (What::Top(_), b"control") => What::Control,
            (What::Top(dir), b"similar") => What::Similar(dir),
            (What::Top(dir), b"neighbors") => What::Neighbors(dir),
            (above @ (What::Similar(dir) | What::Neighbors(dir)), _) => {
                let example = Example::parse(asked)?;
                let (file, _) = self.example_point(caller, dir, &example)?;
                match (self.ingest.volume.content(file), above) {
                    (Some((_, Content::Indexed { .. })), What::Similar(_)) => What::Ranked(dir, asked.to_owned()),
                    (Some((_, Content::Indexed { .. })), _) => What::Linked(dir, asked.to_owned()),
                    _ => return Err(Errno::NODATA),
                }
            }
            (above @ (What::Ranked(..) | What::Linked(..)), _) => {
                let found = self.ranked(caller, &above)?.into_iter().find(|(name, _)| name == asked);
                What::Hit(found.ok_or(Errno::NOENT)?.1)
            }
            _ => return Err(Errno::NOENT),
        };
        Ok(self.enter(what))
    }

    fn example_point(&self, caller: Caller, dir: FileId, example: &Example) -> Result<(FileId, u32), Errno> {
        // `..` and the like can't be in a name; what is left to resolve is NAME or NAME#ROW in `dir` itself.
        let like = example.like.to_str().ok_or(Errno::ILSEQ)?;
        self.service().point(dir, caller, like).map_err(|failure| failure.errno)
    }

    /// Ranked names and their targets, of a directory of such.
    fn ranked(&self, caller: Caller, what: &What) -> Result<Vec<(OsString, OsString)>, Errno> {
        let hits = match what {
            What::Ranked(dir, asked) => self.similar(caller, *dir, asked),
            What::Linked(dir, asked) => self.linked(caller, *dir, asked),
            _ => Err(Errno::NOTDIR),
        }?;
        let digits = hits.len().to_string().len().max(2);
        let ranked = hits.into_iter().enumerate().map(|(rank, hit)| {
            let file = hit.path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
            let mut name = format!("{:0digits$}-{:.4}-", rank + 1, hit.score).into_bytes();
            let row = match hit.row {
                // Elsewhere there is nothing to mistake it for.
                0 if hit.file.is_attached() && Format::of(OsStr::from_bytes(file)).is_some() => {
                    format!("#{ATTACHED}")
                }
                0 => String::new(),
                row => format!("#{row}"),
            };
            // A name has 255 bytes; the link still leads to the file.
            let room = 255usize.saturating_sub(name.len() + row.len());
            name.extend_from_slice(&file[..file.len().min(room)]);
            name.extend_from_slice(row.as_bytes());
            (OsString::from_vec(name), OsString::from_vec(join(b"../../..", &hit.path)))
        });
        Ok(ranked.collect())
    }

    fn linked(&self, caller: Caller, dir: FileId, asked: &OsStr) -> Result<Vec<Hit>, Errno> {
        let example = Example::parse(asked)?;
        if example.k.is_some() || example.ef.is_some() || example.recall.is_some() || example.exact {
            return Err(Errno::INVAL);
        }
        let like = example.like.to_str().ok_or(Errno::ILSEQ)?;
        self.service().neighbors(dir, caller, like).map_err(|failure| {
            log::debug!("neighbors/{}: {}", asked.display(), failure.message);
            failure.errno
        })
    }

    fn similar(&self, caller: Caller, dir: FileId, asked: &OsStr) -> Result<Vec<Hit>, Errno> {
        let example = Example::parse(asked)?;
        let request = Request {
            like: Some(example.like.to_str().ok_or(Errno::ILSEQ)?.to_owned()),
            k: example.k,
            ef: example.ef,
            recall: example.recall,
            exact: example.exact,
            ..Request::default()
        };
        let answer = self.service().answer(dir, caller, &Killed::new(caller), &request).map_err(|failure| {
            log::debug!("similar/{}: {}", asked.display(), failure.message);
            failure.errno
        })?;
        Ok(answer.hits)
    }

    /// Attributes of a node.
    pub fn getattr(&self, id: u64) -> Result<VirtualAttr, Errno> {
        Ok(attr_of(id, &self.what(id)?))
    }

    /// What a virtual directory lists, without `.` and `..`.
    pub fn list(&self, caller: Caller, id: u64) -> Result<Vec<Listed>, Errno> {
        let listed = |name: &str, what: What| Listed { name: OsString::from(name), what };
        match self.what(id)? {
            What::Top(dir) => Ok(vec![
                listed("query", What::Query(dir)),
                listed("stats.json", What::Stats(dir)),
                listed("control", What::Control),
                listed("similar", What::Similar(dir)),
                listed("neighbors", What::Neighbors(dir)),
            ]),
            // Every vector file of the directory could be asked for; naming them all would be a listing of it.
            What::Similar(_) | What::Neighbors(_) => Ok(Vec::new()),
            what @ (What::Ranked(..) | What::Linked(..)) => {
                let ranked = self.ranked(caller, &what)?.into_iter();
                Ok(ranked.map(|(name, target)| Listed { name, what: What::Hit(target) }).collect())
            }
            What::Query(_) | What::Stats(_) | What::Control | What::Hit(_) => Err(Errno::NOTDIR),
        }
    }

    /// Counts a lookup of what was listed.
    pub fn enter_listed(&self, listed: &Listed) -> VirtualAttr {
        self.enter(listed.what.clone())
    }

    /// A ranked link's target.
    pub fn readlink(&self, id: u64) -> Result<Vec<u8>, Errno> {
        match self.what(id)? {
            What::Hit(target) => Ok(target.into_vec()),
            _ => Err(Errno::INVAL),
        }
    }

    /// Opens a virtual file.
    pub fn open(&self, caller: Caller, id: u64, writable: bool) -> Result<u64, Errno> {
        let open = match self.what(id)? {
            What::Query(scope) => Open::Query { scope, request: Vec::new(), answer: Vec::new(), taken: 0 },
            What::Control if caller.identify()? != Identity::Own => return Err(Errno::ACCESS),
            What::Control => Open::Control,
            What::Stats(_) if writable => return Err(Errno::ACCESS),
            What::Stats(scope) => Open::Text(self.stats(caller, scope)?),
            _ => return Err(Errno::ISDIR),
        };
        let mut next = self.next_handle.lock();
        *next += 1;
        self.open.write().insert(*next, Arc::new(Mutex::new(open)));
        Ok(*next)
    }

    fn handle(&self, handle: u64) -> Result<Arc<Mutex<Open>>, Errno> {
        self.open.read().get(&handle).cloned().ok_or(Errno::BADF)
    }

    /// Reads. A query file gives what of its answers was not read yet, whatever the offset: a request that has no
    /// line end yet is taken as complete.
    pub fn read(&self, caller: Caller, handle: u64, offset: u64, size: usize) -> Result<Vec<u8>, Errno> {
        let handle = self.handle(handle)?;
        let mut open = handle.lock();
        match &mut *open {
            Open::Text(text) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
                Ok(text[start..text.len().min(start.saturating_add(size))].to_vec())
            }
            Open::Control => Ok(Vec::new()),
            Open::Query { scope, request, answer, taken } => {
                if !request.iter().all(u8::is_ascii_whitespace) {
                    request.push(b'\n');
                    self.take_lines(caller, *scope, request, answer)?;
                }
                let end = answer.len().min(*taken + size);
                let bytes = answer[*taken..end].to_vec();
                *taken = end;
                if *taken == answer.len() {
                    answer.clear();
                    *taken = 0;
                }
                Ok(bytes)
            }
        }
    }

    /// Writes requests to a query file. Whole lines are answered at once.
    pub fn write(&self, caller: Caller, handle: u64, data: &[u8]) -> Result<usize, Errno> {
        let handle = self.handle(handle)?;
        let mut open = handle.lock();
        if matches!(*open, Open::Control) {
            return obey(&self.ingest.volume, &self.command, caller, data).map(|()| data.len()).map_err(|failure| {
                log::warn!("control: {}", failure.message);
                failure.errno
            });
        }
        let Open::Query { scope, request, answer, .. } = &mut *open else { return Err(Errno::ACCESS) };
        if request.len() + data.len() > MAX_BUFFER {
            log::info!("a request of more than {MAX_BUFFER} bytes was refused");
            return Err(Errno::TOOBIG);
        }
        request.extend_from_slice(data);
        if data.contains(&b'\n') {
            self.take_lines(caller, *scope, request, answer)?;
        }
        Ok(data.len())
    }

    fn take_lines(
        &self,
        caller: Caller,
        scope: FileId,
        request: &mut Vec<u8>,
        answer: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let whole = request.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let lines: Vec<u8> = request.drain(..whole).collect();
        let killed = Killed::new(caller);
        for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.iter().all(u8::is_ascii_whitespace)) {
            if answer.len() > MAX_BUFFER {
                log::info!("more than {MAX_BUFFER} bytes of answers wait to be read");
                return Err(Errno::TOOBIG);
            }
            if killed.is_so() {
                return Err(Errno::INTR);
            }
            answer.extend_from_slice(&self.service().answer_line(scope, caller, &killed, line).to_line());
        }
        Ok(())
    }

    /// Closes a virtual file.
    pub fn release(&self, handle: u64) {
        self.open.write().remove(&handle);
    }

    /// Takes lookups back.
    pub fn forget(&self, id: u64, count: u64) {
        let mut table = self.table.lock();
        let Some(node) = table.by_id.get_mut(&id) else { return };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups == 0
            && let Some(gone) = table.by_id.remove(&id)
        {
            table.by_what.remove(&gone.what);
        }
    }

    /// A computed attribute of a real file: `user.vexfs.status`.
    pub fn xattr(&self, file: FileId, asked: &OsStr) -> Option<Result<Vec<u8>, Errno>> {
        if asked != STATUS {
            return None;
        }
        let state = |id| self.ingest.volume.content(id).map(|(_, content)| in_words(content));
        let attached = state(file.attached()).map(|state| format!("attached: {state}"));
        let states: Vec<String> = state(file).into_iter().chain(attached).collect();
        Some(if states.is_empty() { Err(Errno::NODATA) } else { Ok(states.join("; ").into_bytes()) })
    }

    fn stats(&self, caller: Caller, scope: FileId) -> Result<Vec<u8>, Errno> {
        let mut report = self.ingest.volume.report(scope);
        let base = self.ingest.volume.dir_path(scope).unwrap_or_default();
        let identity = self.access.identify(caller).map_err(|failure: Failure| failure.errno)?;
        // Names of files that the caller may not read are not told.
        report.errors.retain(|error| self.access.readable(&identity, &join(&base, error.path.as_bytes())).is_some());
        let value = serde_json::json!({
            "mountpoint": self.facts.mountpoint,
            "source": self.facts.source,
            "state": self.facts.state,
            "pid": std::process::id(),
            "io": *self.io.lock(),
            "backed": self.backed.load(Ordering::Relaxed),
            "strict": self.facts.strict,
            "beneath": *self.ingest.beneath.lock(),
            "panics": handling::PANICS.load(Ordering::Relaxed),
            "stack": handling::stacks(),
            "version": env!("CARGO_PKG_VERSION"),
        });
        let mut report = serde_json::to_value(&report).map_err(|_| Errno::IO)?;
        if let (Some(all), Some(more)) = (report.as_object_mut(), value.as_object()) {
            // Counts and collections are of the volume, whoever may read what: for its owner only.
            if matches!(identity, Identity::Other { .. }) {
                all.retain(|key, _| TOLD_TO_ALL.contains(&key.as_str()));
            }
            all.extend(more.clone());
        }
        let mut text = serde_json::to_vec_pretty(&report).map_err(|_| Errno::IO)?;
        text.push(b'\n');
        Ok(text)
    }
}

/// What `stats.json` tells of the store to those who are not the daemon's user.
const TOLD_TO_ALL: [&str; 2] = ["errors", "sync"];

fn in_words(content: Content) -> String {
    match content {
        Content::Indexed { rows, .. } => format!("indexed {rows}"),
        Content::Empty => "empty".to_owned(),
        Content::Unread => "unread".to_owned(),
        Content::Refused { errno, reason } => format!("{}: {reason}", name(Errno::from_raw_os_error(errno))),
    }
}

/// The computed attribute.
pub const STATUS: &str = "user.vexfs.status";

fn attr_of(id: u64, what: &What) -> VirtualAttr {
    let (kind, mode, size) = match what {
        What::Top(_) | What::Similar(_) | What::Neighbors(_) | What::Ranked(..) | What::Linked(..) => {
            (Kind::Dir, 0o555, 0)
        }
        What::Query(_) => (Kind::File, 0o666, 0),
        What::Stats(_) => (Kind::File, 0o444, 0),
        What::Control => (Kind::File, 0o600, 0),
        What::Hit(target) => (Kind::Link, 0o777, target.len() as u64),
    };
    VirtualAttr { id, kind, mode, size }
}

/// `NAME[#ROW][?k=20&recall=0.99]`. A file whose name has a `?` is asked for with one more `?` at the end.
struct Example {
    like: OsString,
    k: Option<usize>,
    ef: Option<usize>,
    recall: Option<f32>,
    exact: bool,
}

impl Example {
    fn parse(asked: &OsStr) -> Result<Example, Errno> {
        let bytes = asked.as_bytes();
        let (like, options) = match bytes.iter().rposition(|byte| *byte == b'?') {
            Some(at) => (&bytes[..at], std::str::from_utf8(&bytes[at + 1..]).map_err(|_| Errno::INVAL)?),
            None => (bytes, ""),
        };
        let like = OsStr::from_bytes(like).to_owned();
        let mut example = Example { like, k: None, ef: None, recall: None, exact: false };
        for option in options.split('&').filter(|option| !option.is_empty()) {
            let (key, value) = option.split_once('=').ok_or(Errno::INVAL)?;
            match key {
                "k" => example.k = Some(value.parse().map_err(|_| Errno::INVAL)?),
                "ef" => example.ef = Some(value.parse().map_err(|_| Errno::INVAL)?),
                "recall" => example.recall = Some(value.parse().map_err(|_| Errno::INVAL)?),
                "exact" => example.exact = value == "1" || value == "true",
                _ => return Err(Errno::INVAL),
            }
        }
        Ok(example)
    }
}
