//! The segment file: immutable vectors with their graph. `docs/format.md` maps every byte.
//!
//! Sections start at multiples of 4,096 and are followed by one checksum for each block of 64 KiB and a footer of
//! fixed size, last. A segment is written under a temporary name, synced, renamed, and its folder synced, before
//! the catalog names it. Opening verifies every block but those of full vectors, which are most of a segment: these are
//! verified before a hit of theirs is returned ([`Segment::trust`]) and, all of them, behind ([`Segment::verify`]). So a
//! hit is never computed from bytes that rotted.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use vexfs_index::{Built, Bytes, Element, FormatError, Index, Metric, Region, Sealed, Space};

use crate::budget::Share;
use crate::disk::Disk;
use crate::id::{FileId, Generation, SegmentId};

/// The format's version; a new one keeps reading the old.
pub const VERSION: u32 = 1;
/// First and last bytes of a segment.
pub const MAGIC: [u8; 8] = *b"VEXFSEG\0";
/// Sections' alignment.
pub const ALIGN: u64 = 4096;
/// Bytes that one checksum covers.
pub const BLOCK: usize = 64 << 10;
/// Bytes of the footer.
pub const FOOTER: usize = 192;

/// Offsets inside the footer.
pub mod footer {
    /// [`super::MAGIC`].
    pub const MAGIC: usize = 0;
    /// u32.
    pub const VERSION: usize = 8;
    /// u32, [`super::BLOCK`].
    pub const BLOCK: usize = 12;
    /// u64.
    pub const SEGMENT: usize = 16;
    /// u32.
    pub const DIMENSION: usize = 24;
    /// u8: 0 l2, 1 ip, 2 cosine.
    pub const METRIC: usize = 28;
    /// u8: 0 f32, 1 f16, 2 i8, 3 u8.
    pub const ELEMENT: usize = 29;
    /// u64: points.
    pub const POINTS: usize = 32;
    /// Six pairs of u64 offset and length: files, points, vectors, codes, graph, checksums.
    pub const SECTIONS: usize = 40;
    /// u32: crc32c of the footer's bytes before.
    pub const CRC: usize = 180;
    /// [`super::MAGIC`] again: the file's last bytes.
    pub const END: usize = 184;
}

/// Bytes of an entry in the files section: u64 inode, u64 generation, u32 rows, u32 zero.
pub const FILE_ENTRY: usize = 24;
/// Bytes of an entry in the points section: u32 index into files, u32 row.
pub const POINT_ENTRY: usize = 8;

/// A file whose vectors a segment holds.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct SegmentFile {
    /// Which.
    pub file: FileId,
    /// Which reading of it.
    pub generation: Generation,
    /// Its rows in all, here or (after a crash of the disk below) lost.
    pub rows: u32,
}

/// Why a segment can't be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SegmentError {
    /// The file can't be read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The bytes are not a segment of a version that this build reads.
    #[error("{0}")]
    Malformed(&'static str),
    /// A block's checksum doesn't match.
    #[error("block at {offset} fails its checksum")]
    Checksum {
        /// Byte offset of the block.
        offset: usize,
    },
    /// The index sections contradict themselves.
    #[error("{0}")]
    Index(#[from] FormatError),
}

/// What goes into a segment.
pub struct Content<'a> {
    /// Schema of the rows.
    pub space: Space,
    /// The files, in any order.
    pub files: &'a [SegmentFile],
    /// For each row: index into `files`, row there.
    pub points: &'a [(u32, u32)],
    /// What the index was built over.
    pub rows: &'a [u8],
    /// The index.
    pub built: &'a Built,
}

/// Told of bytes that were read or written, it answers whether work is to go on, and when.
pub type GoOn<'a> = &'a (dyn Fn(usize) -> bool + Sync);

/// Writes a segment and makes it durable; also in between, as soon as `sync_every` bytes are not. On an error no segment of
/// this id exists. What `go_on` answers is heeded as to when, not whether.
pub fn write(
    disk: &dyn Disk,
    id: SegmentId,
    content: &Content<'_>,
    go_on: GoOn<'_>,
    sync_every: usize,
) -> io::Result<()> {
    let path = id.path();
    let temporary = format!("{path}.tmp");
    let result = write_to(disk, &temporary, id, content, go_on, sync_every)
        .and_then(|()| disk.rename(&temporary, &path))
        .and_then(|()| disk.sync_dir("segments"))
        // The folder's own name: it may have been made just now.
        .and_then(|()| disk.sync_dir(""));
    if result.is_err() {
        // Best effort: an orphan is removed by the next open.
        for name in [&temporary, &path] {
            if let Err(error) = disk.remove(name) {
                log::warn!("{name}: can't be removed after a failed write: {error}");
            }
        }
    }
    result
}

fn write_to(
    disk: &dyn Disk,
    name: &str,
    id: SegmentId,
    content: &Content<'_>,
    go_on: GoOn<'_>,
    sync_every: usize,
) -> io::Result<()> {
    let file = disk.open(name)?;
    file.set_len(0)?;
    let mut out = Blocks {
        file: &*file,
        block: Vec::with_capacity(BLOCK),
        offset: 0,
        crcs: Vec::new(),
        go_on,
        sync_every,
        unsynced: 0,
    };
    let mut sections = Vec::new();
    let mut section = |out: &mut Blocks<'_>, fill: &dyn Fn(&mut Blocks<'_>) -> io::Result<()>| {
        out.align()?;
        let start = out.position();
        fill(out)?;
        sections.push((start, out.position() - start));
        Ok::<(), io::Error>(())
    };
    let Content { space, files, points, rows, built } = content;
    section(&mut out, &|out| {
        files.iter().try_for_each(|file| {
            let mut entry = [0; FILE_ENTRY];
            entry[..8].copy_from_slice(&file.file.0.to_le_bytes());
            entry[8..16].copy_from_slice(&file.generation.0.to_le_bytes());
            entry[16..20].copy_from_slice(&file.rows.to_le_bytes());
            out.put(&entry)
        })
    })?;
    section(&mut out, &|out| {
        built.order.iter().try_for_each(|at| {
            let (file, row) = points[*at as usize];
            let mut entry = [0; POINT_ENTRY];
            entry[..4].copy_from_slice(&file.to_le_bytes());
            entry[4..].copy_from_slice(&row.to_le_bytes());
            out.put(&entry)
        })
    })?;
    section(&mut out, &|out| built.vectors(space, rows, &mut |bytes| out.put(bytes)))?;
    section(&mut out, &|out| built.codes(&mut |bytes| out.put(bytes)))?;
    section(&mut out, &|out| built.graph(&mut |bytes| out.put(bytes)))?;
    out.align()?;
    out.flush()?;
    let at = out.offset;
    let crcs = std::mem::take(&mut out.crcs);
    file.write_at(at, &crcs)?;
    sections.push((at, crcs.len() as u64));

    let mut bytes = [0; FOOTER];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(footer::MAGIC, &MAGIC);
    put(footer::VERSION, &VERSION.to_le_bytes());
    put(footer::BLOCK, &(BLOCK as u32).to_le_bytes());
    put(footer::SEGMENT, &id.0.to_le_bytes());
    put(footer::DIMENSION, &(content.space.dim() as u32).to_le_bytes());
    put(footer::METRIC, &[metric_code(content.space.metric())]);
    put(footer::ELEMENT, &[element_code(content.space.element())]);
    put(footer::POINTS, &(content.points.len() as u64).to_le_bytes());
    for (n, (offset, len)) in sections.iter().enumerate() {
        put(footer::SECTIONS + n * 16, &offset.to_le_bytes());
        put(footer::SECTIONS + n * 16 + 8, &len.to_le_bytes());
    }
    put(footer::END, &MAGIC);
    // The checksums' own checksum is in the footer's: the footer covers them by value.
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..footer::CRC]), &crcs);
    bytes[footer::CRC..footer::CRC + 4].copy_from_slice(&crc.to_le_bytes());
    file.write_at(at + crcs.len() as u64, &bytes)?;
    file.sync()
}

/// Writes in blocks and notes each block's checksum.
struct Blocks<'a> {
    file: &'a dyn crate::disk::DiskFile,
    block: Vec<u8>,
    offset: u64,
    crcs: Vec<u8>,
    go_on: GoOn<'a>,
    sync_every: usize,
    unsynced: usize,
}

impl Blocks<'_> {
    fn position(&self) -> u64 {
        self.offset + self.block.len() as u64
    }

    fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let n = bytes.len().min(BLOCK - self.block.len());
            self.block.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            if self.block.len() == BLOCK {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn align(&mut self) -> io::Result<()> {
        let padding = self.position().next_multiple_of(ALIGN) - self.position();
        self.put(&vec![0; padding as usize])
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.block.is_empty() {
            self.file.write_at(self.offset, &self.block)?;
            self.crcs.extend_from_slice(&crc32c::crc32c(&self.block).to_le_bytes());
            self.offset += self.block.len() as u64;
            self.unsynced += self.block.len();
            if self.unsynced >= self.sync_every {
                self.file.sync()?;
                self.unsynced = 0;
            }
            (self.go_on)(self.block.len());
            self.block.clear();
        }
        Ok(())
    }
}

/// An open segment.
pub struct Segment {
    /// Its id.
    pub id: SegmentId,
    /// The graph over the mapped bytes.
    pub index: Sealed,
    /// Bytes on disk.
    pub bytes: u64,
    /// What the copies of what walks read take of the budget, if there are any.
    pub(crate) copies: OnceLock<Share>,
    files: Slice,
    points: Slice,
    vectors: Unproven,
}

impl Segment {
    /// Opens a segment and verifies all of it but full vectors.
    pub fn open(disk: &dyn Disk, id: SegmentId) -> Result<Segment, SegmentError> {
        let region = disk.map(&id.path())?;
        let parsed = parse(region.bytes(), id)?;
        let [files, points, vectors, codes, graph] = parsed.sections;
        let section = |range: Range<usize>| -> Region { Arc::new(Slice { region: region.clone(), range }) };
        let index = Sealed::open(parsed.space, section(vectors.clone()), section(codes), section(graph))?;
        if index.len() != parsed.points {
            return Err(SegmentError::Malformed("the graph has another number of points"));
        }
        let files = Slice { region: region.clone(), range: files };
        let count = files.bytes().len() / FILE_ENTRY;
        let points = Slice { region: region.clone(), range: points };
        if points.bytes().chunks_exact(POINT_ENTRY).any(|entry| u32_at(entry, 0) as usize >= count) {
            return Err(SegmentError::Malformed("a point names a file that isn't listed"));
        }
        let (bytes, row_bytes) = (region.bytes().len() as u64, parsed.space.row_bytes());
        let vectors = Unproven::new(region, parsed.checksums, vectors, row_bytes);
        Ok(Segment { id, index, bytes, copies: OnceLock::new(), files, points, vectors })
    }

    /// Is it of this schema? A search would read rows of another length than they have.
    pub fn fits(&self, space: Option<&Space>) -> Result<(), SegmentError> {
        match space == Some(self.index.space()) {
            true => Ok(()),
            false => Err(SegmentError::Malformed("rows of another kind than its collection's")),
        }
    }

    /// Is the full vector of a slot as it was written?
    pub fn trust(&self, slot: usize) -> Result<(), SegmentError> {
        self.vectors.prove_row(slot)
    }

    /// Verifies what [`Segment::open`] left. False if it was not to `go_on`.
    pub fn verify(&self, go_on: GoOn<'_>) -> Result<bool, SegmentError> {
        self.vectors.prove_all(go_on)
    }

    /// The files whose vectors it holds.
    pub fn files(&self) -> impl ExactSizeIterator<Item = SegmentFile> {
        self.files.bytes().chunks_exact(FILE_ENTRY).map(file_of)
    }

    /// One of them.
    pub fn file(&self, number: usize) -> Option<SegmentFile> {
        self.files.bytes().get(number * FILE_ENTRY..(number + 1) * FILE_ENTRY).map(file_of)
    }

    /// Index into the files and row of a slot.
    pub fn point(&self, slot: usize) -> Option<(u32, u32)> {
        let entry = self.points.bytes().get(slot * POINT_ENTRY..(slot + 1) * POINT_ENTRY)?;
        Some((u32_at(entry, 0), u32_at(entry, 4)))
    }
}

fn file_of(entry: &[u8]) -> SegmentFile {
    SegmentFile { file: FileId(u64_at(entry, 0)), generation: Generation(u64_at(entry, 8)), rows: u32_at(entry, 16) }
}

/// Blocks of full vectors, and which of them were found to be as they were written.
struct Unproven {
    region: Region,
    checksums: Range<usize>,
    vectors: Range<usize>,
    row_bytes: usize,
    proven: Vec<AtomicBool>,
    all: AtomicBool,
}

impl Unproven {
    fn new(region: Region, checksums: Range<usize>, vectors: Range<usize>, row_bytes: usize) -> Unproven {
        let proven = blocks_of(&vectors).map(|_| AtomicBool::new(false)).collect();
        Unproven { region, checksums, vectors, row_bytes, proven, all: AtomicBool::new(false) }
    }

    /// Bytes that had to be read for it.
    fn prove(&self, block: usize) -> Result<usize, SegmentError> {
        match self.proven.get(block - blocks_of(&self.vectors).start) {
            Some(proven) if !proven.load(Ordering::Relaxed) => {
                check_block(self.region.bytes(), &self.checksums, block)?;
                proven.store(true, Ordering::Relaxed);
                Ok(BLOCK)
            }
            _ => Ok(0),
        }
    }

    fn prove_row(&self, slot: usize) -> Result<(), SegmentError> {
        if self.all.load(Ordering::Relaxed) {
            return Ok(());
        }
        let start = self.vectors.start + slot * self.row_bytes;
        blocks_of(&(start..start + self.row_bytes)).try_for_each(|block| self.prove(block).map(|_| ()))
    }

    fn prove_all(&self, go_on: GoOn<'_>) -> Result<bool, SegmentError> {
        for block in blocks_of(&self.vectors) {
            if !go_on(self.prove(block)?) {
                return Ok(false);
            }
        }
        self.all.store(true, Ordering::Relaxed);
        Ok(true)
    }
}

/// The blocks that a range of bytes touches.
fn blocks_of(range: &Range<usize>) -> Range<usize> {
    match range.is_empty() {
        true => range.start / BLOCK..range.start / BLOCK,
        false => range.start / BLOCK..range.end.div_ceil(BLOCK),
    }
}

fn check_block(bytes: &[u8], checksums: &Range<usize>, block: usize) -> Result<(), SegmentError> {
    let offset = block * BLOCK;
    let data = bytes.get(offset..checksums.start.min(offset + BLOCK)).unwrap_or_default();
    match crc32c::crc32c(data) == u32_at(bytes, checksums.start + block * 4) {
        true => Ok(()),
        false => Err(SegmentError::Checksum { offset }),
    }
}

struct Parsed {
    space: Space,
    points: usize,
    sections: [Range<usize>; 5],
    checksums: Range<usize>,
}

fn parse(bytes: &[u8], id: SegmentId) -> Result<Parsed, SegmentError> {
    use SegmentError::Malformed;
    let Some(start) = bytes.len().checked_sub(FOOTER) else {
        return Err(Malformed("too short for a footer"));
    };
    let (body, foot) = bytes.split_at(start);
    if foot[footer::MAGIC..][..8] != MAGIC || foot[footer::END..][..8] != MAGIC {
        return Err(Malformed("no footer"));
    }
    if u32_at(foot, footer::VERSION) != VERSION {
        return Err(Malformed("a version that this build doesn't read"));
    }
    let mut ranges = [const { 0..0 }; 6];
    for (n, range) in ranges.iter_mut().enumerate() {
        let offset = u64_at(foot, footer::SECTIONS + n * 16);
        let len = u64_at(foot, footer::SECTIONS + n * 16 + 8);
        let end = offset.checked_add(len).filter(|end| *end <= body.len() as u64);
        let Some(end) = end else { return Err(Malformed("a section past the end")) };
        *range = offset as usize..end as usize;
    }
    let [files, points, vectors, codes, graph, checksums] = ranges;
    if checksums.end != body.len() {
        return Err(Malformed("checksums are not last"));
    }
    let crcs = &body[checksums.clone()];
    let crc = crc32c::crc32c_append(crc32c::crc32c(&foot[..footer::CRC]), crcs);
    if crc != u32_at(foot, footer::CRC) {
        return Err(SegmentError::Checksum { offset: start });
    }
    if u64_at(foot, footer::SEGMENT) != id.0 || u32_at(foot, footer::BLOCK) as usize != BLOCK {
        return Err(Malformed("another segment's bytes"));
    }
    let data = &body[..checksums.start];
    if crcs.len() != data.len().div_ceil(BLOCK) * 4 {
        return Err(Malformed("a checksum for each block is wanted"));
    }
    // A block that holds nothing but full vectors waits; see `Unproven`.
    let waiting = vectors.start.div_ceil(BLOCK)..vectors.end / BLOCK;
    for block in (0..data.len().div_ceil(BLOCK)).filter(|block| !waiting.contains(block)) {
        check_block(bytes, &checksums, block)?;
    }
    let count = u64_at(foot, footer::POINTS) as usize;
    let metric = metric_of(foot[footer::METRIC]).ok_or(Malformed("an unknown metric"))?;
    let element = element_of(foot[footer::ELEMENT]).ok_or(Malformed("an unknown element type"))?;
    let space = Space::new(u32_at(foot, footer::DIMENSION) as usize, metric, element)
        .map_err(|_| Malformed("an impossible dimension"))?;
    if files.len() % FILE_ENTRY != 0
        || count.checked_mul(POINT_ENTRY) != Some(points.len())
        || count.checked_mul(space.row_bytes()) != Some(vectors.len())
    {
        return Err(Malformed("sections of other lengths than the points ask for"));
    }
    Ok(Parsed { space, points: count, sections: [files, points, vectors, codes, graph], checksums })
}

struct Slice {
    region: Region,
    range: Range<usize>,
}

impl Bytes for Slice {
    fn bytes(&self) -> &[u8] {
        &self.region.bytes()[self.range.clone()]
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

const METRICS: [Metric; 4] = [Metric::L2, Metric::InnerProduct, Metric::Cosine, Metric::Hamming];
const ELEMENTS: [Element; 5] = [Element::F32, Element::F16, Element::I8, Element::U8, Element::Bits];

fn metric_code(metric: Metric) -> u8 {
    match metric {
        Metric::L2 => 0,
        Metric::InnerProduct => 1,
        Metric::Cosine => 2,
        Metric::Hamming => 3,
    }
}

fn metric_of(code: u8) -> Option<Metric> {
    METRICS.get(code as usize).copied()
}

fn element_code(element: Element) -> u8 {
    match element {
        Element::F32 => 0,
        Element::F16 => 1,
        Element::I8 => 2,
        Element::U8 => 3,
        Element::Bits => 4,
    }
}

fn element_of(code: u8) -> Option<Element> {
    ELEMENTS.get(code as usize).copied()
}
