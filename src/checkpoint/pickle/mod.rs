//! State dicts as `torch.save` writes them (zip archives since PyTorch 1.6): `pytorch_model.bin`, `lit_model.pth`,
//! `adapter_model.bin`. Reading gives names, dtypes, shapes and where the bytes are; writing is one tensor at a time.
//!
//! A pickle is a program. This reader knows the handful of instructions and of names that a state dict consists of, as
//! `torch.load(weights_only=True)` does, and refuses a file that names anything else: nothing is ever executed. The
//! machine has no recursion, its memory is bounded by the size of the program, and that by a limit.

mod write;

pub use write::save;

use super::AGAIN;
use super::archive;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// Longest program: a tensor takes some 150 bytes of it.
const LONGEST: usize = 16 << 20;
/// Most values of a program: a tensor takes some twenty of them.
const MOST_VALUES: usize = 2 << 20;
/// Most dimensions of a tensor.
const MOST_DIMS: usize = 8;

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Dtype, as safetensors names it.
    pub dtype: &'static str,
    /// Shape.
    pub shape: Vec<usize>,
    /// Its bytes in the file.
    pub bytes: Range<usize>,
}

/// What can be wrong with a program.
enum Fault {
    Broken(String),
    /// A call of what no state dict needs.
    Call(String),
    /// A tensor whose elements are not in order.
    View(String),
}

fn broken<T>(what: impl Into<String>) -> std::result::Result<T, Fault> {
    Err(Fault::Broken(what.into()))
}

type Step<T> = std::result::Result<T, Fault>;

/// The tensors of the state dict in the file `path`, whose bytes are `file`, by name. The dict may stand in another one
/// as `model`, `state_dict` or `module`.
///
/// # Errors
/// When the file is broken, is older than PyTorch 1.6, or holds something else than tensors.
pub fn tensors(path: &Path, file: &[u8]) -> Result<HashMap<String, Tensor>> {
    let resave = "save it again in Python: torch.save(torch.load(FILE, weights_only=True), FILE), or as safetensors";
    if !archive::is_zip(file) {
        // An older file begins with a pickled magic number.
        if file.starts_with(&[0x80, 2, 0x8a, 10]) {
            return Err(Error::unsupported(
                format!("`{}` is in the format of PyTorch before 1.6", path.display()),
                resave,
            ));
        }
        return Err(Error::invalid(path, "not a file of torch.save", AGAIN));
    }
    let whole = |problem: String| Error::invalid(path, format!("not a whole file of torch.save: {problem}"), AGAIN);
    let entries = archive::entries(file).map_err(whole)?;
    let mut programs = entries.keys().filter(|n| n.ends_with("/data.pkl"));
    let (Some(program), None) = (programs.next(), programs.next()) else {
        return Err(whole("it has not one `data.pkl`".to_owned()));
    };
    let prefix = program.trim_end_matches("data.pkl");
    if entries.get(&format!("{prefix}byteorder")).is_some_and(|r| &file[r.clone()] == b"big") {
        return Err(Error::unsupported(format!("big-endian numbers (`{}`)", path.display()), resave));
    }
    let program = &file[entries[program].clone()];
    if program.len() > LONGEST {
        return Err(whole(format!("its `data.pkl` has {} bytes, more than any state dict", program.len())));
    }
    let found =
        Machine { program, at: 0, nodes: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    found.run().and_then(|(nodes, root)| state_dict(&nodes, root, prefix, &entries)).map_err(|fault| match fault {
        Fault::Broken(problem) => whole(problem),
        Fault::View(what) => {
            let hint = "save the tensors with .contiguous() in Python, or get the model as safetensors";
            Error::unsupported(format!("{what} (`{}`)", path.display()), hint)
        }
        Fault::Call(name) => {
            let what = format!("`{}` wants to call `{name}`, and nothing in a file is ever executed", path.display());
            Error::unsupported(what, "only plain state dicts are read; get the model as safetensors")
        }
    })
}

/// A value; others are referred to by their index.
#[derive(Debug, Clone)]
enum Node<'a> {
    None,
    Int(i64),
    Text(&'a str),
    /// Module and name of something of Python's.
    Name(&'a str, &'a str),
    Tuple(Vec<usize>),
    List(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    /// Kind, key and number of elements.
    Storage(&'a str, String, u64),
    Rebuilt(Box<Rebuilt>),
    /// A number that no tensor needs.
    Other,
}

/// A tensor before its storage is looked up.
#[derive(Debug, Clone)]
struct Rebuilt {
    key: String,
    dtype: &'static str,
    size: u64,
    storage_bytes: u64,
    offset: u64,
    shape: Vec<u64>,
    strides: Vec<u64>,
}

struct Machine<'a> {
    program: &'a [u8],
    at: usize,
    nodes: Vec<Node<'a>>,
    stack: Vec<usize>,
    marks: Vec<usize>,
    memo: HashMap<u64, usize>,
}

impl<'a> Machine<'a> {
    /// All values, and which one the program gives.
    fn run(mut self) -> Step<(Vec<Node<'a>>, usize)> {
        while self.step()? {
            if self.nodes.len().max(self.stack.len()).max(self.marks.len()).max(self.memo.len()) > MOST_VALUES {
                return broken("its program makes more values than any state dict");
            }
        }
        let root = self.pop()?;
        Ok((self.nodes, root))
    }

    fn take(&mut self, len: usize) -> Step<&'a [u8]> {
        let bytes = self.at.checked_add(len).and_then(|end| self.program.get(self.at..end));
        let Some(bytes) = bytes else { return broken("its program ends too early") };
        self.at += len;
        Ok(bytes)
    }

    fn number(&mut self, len: usize) -> Step<u64> {
        Ok(self.take(len)?.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    }

    fn text(&mut self, len: u64) -> Step<&'a str> {
        let Ok(len) = usize::try_from(len) else { return broken("a text is too long") };
        std::str::from_utf8(self.take(len)?).or_else(|_| broken("a text is not UTF-8"))
    }

    fn line(&mut self) -> Step<&'a str> {
        let Some(len) = self.program[self.at..].iter().position(|b| *b == b'\n') else {
            return broken("its program ends too early");
        };
        let line = self.text(len as u64)?;
        self.at += 1;
        Ok(line)
    }

    fn push(&mut self, node: Node<'a>) {
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
    }

    /// The topmost value above the last mark.
    fn pop(&mut self) -> Step<usize> {
        if self.stack.len() <= self.marks.last().copied().unwrap_or(0) {
            return broken("its program takes a value that is not there");
        }
        self.stack.pop().map_or_else(|| broken("its program takes a value that is not there"), Ok)
    }

    fn top(&mut self) -> Step<usize> {
        let top = self.pop()?;
        self.stack.push(top);
        Ok(top)
    }

    fn pop_to_mark(&mut self) -> Step<Vec<usize>> {
        let Some(mark) = self.marks.pop() else { return broken("its program has no mark to go back to") };
        Ok(self.stack.split_off(mark))
    }

    fn tuple(&mut self, len: usize) -> Step<()> {
        let mut items = (0..len).map(|_| self.pop()).collect::<Step<Vec<usize>>>()?;
        items.reverse();
        self.push(Node::Tuple(items));
        Ok(())
    }

    fn get(&mut self, key: u64) -> Step<()> {
        let Some(index) = self.memo.get(&key) else { return broken("its program recalls what it never kept") };
        self.stack.push(*index);
        Ok(())
    }

    fn keep(&mut self, key: u64) -> Step<()> {
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }

    /// One instruction; false at the end.
    fn step(&mut self) -> Step<bool> {
        match self.number(1)? as u8 {
            0x80 => drop(self.take(1)?), // PROTO
            0x95 => drop(self.take(8)?), // FRAME
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.push(Node::None),
            0x88 | 0x89 => self.push(Node::Other), // NEWTRUE, NEWFALSE
            b'K' | b'M' | b'J' | 0x8a | b'G' => self.constant()?,
            b'X' | 0x8c | 0x8d => self.string()?,
            b')' => self.push(Node::Tuple(Vec::new())),
            b']' => self.push(Node::List(Vec::new())),
            b'}' => self.push(Node::Dict(Vec::new())),
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Node::Tuple(items));
            }
            b'q' => {
                let key = self.number(1)?;
                self.keep(key)?
            }
            b'r' => {
                let key = self.number(4)?;
                self.keep(key)?
            }
            0x94 => self.keep(self.memo.len() as u64)?, // MEMOIZE
            b'h' => {
                let key = self.number(1)?;
                self.get(key)?
            }
            b'j' => {
                let key = self.number(4)?;
                self.get(key)?
            }
            b'a' => {
                let item = self.pop()?;
                self.append(&[item])?
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(&items)?
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set(&[key, value])?
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set(&items)?
            }
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                self.push(Node::Name(module, name))
            }
            0x93 => self.stack_global()?,
            b'Q' => self.persistent()?,
            b'R' | 0x81 => self.call()?, // REDUCE, NEWOBJ
            b'b' => drop(self.pop()?),   // BUILD: attributes of a dict, which say nothing of the tensors
            b'.' => return Ok(false),
            other => return broken(format!("its program has the instruction {other:#04x}, which no state dict has")),
        }
        Ok(true)
    }

    fn constant(&mut self) -> Step<()> {
        let kind = self.program[self.at - 1];
        let node = match kind {
            b'K' => Node::Int(self.number(1)? as i64),
            b'M' => Node::Int(self.number(2)? as i64),
            b'J' => Node::Int(i64::from(self.number(4)? as u32 as i32)),
            b'G' => {
                self.take(8)?;
                Node::Other
            }
            _ => {
                let len = self.number(1)? as usize;
                let bytes = self.take(len)?;
                if len > 8 {
                    return broken("a number has more than 64 bits");
                }
                let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
                let start = if negative { -1 } else { 0 };
                Node::Int(bytes.iter().rev().fold(start, |n, b| n << 8 | i64::from(*b)))
            }
        };
        self.push(node);
        Ok(())
    }

    fn string(&mut self) -> Step<()> {
        let len = match self.program[self.at - 1] {
            b'X' => self.number(4)?,
            0x8c => self.number(1)?,
            _ => self.number(8)?,
        };
        let text = self.text(len)?;
        self.push(Node::Text(text));
        Ok(())
    }

    fn stack_global(&mut self) -> Step<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        let (Node::Text(module), Node::Text(name)) = (&self.nodes[module], &self.nodes[name]) else {
            return broken("a name of Python's is not text");
        };
        let node = Node::Name(module, name);
        self.push(node);
        Ok(())
    }

    fn append(&mut self, items: &[usize]) -> Step<()> {
        let top = self.top()?;
        let Node::List(list) = &mut self.nodes[top] else { return broken("its program appends to what is no list") };
        list.extend_from_slice(items);
        Ok(())
    }

    fn set(&mut self, items: &[usize]) -> Step<()> {
        let top = self.top()?;
        let Node::Dict(dict) = &mut self.nodes[top] else { return broken("its program sets a key of what is no dict") };
        if !items.len().is_multiple_of(2) {
            return broken("its program sets a key without a value");
        }
        dict.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
        Ok(())
    }

    /// `("storage", kind, key, device, elements)`, what a persistent id of PyTorch's is.
    fn persistent(&mut self) -> Step<()> {
        let id = self.pop()?;
        let Node::Tuple(items) = &self.nodes[id] else { return broken("a storage is not a tuple") };
        let items: Vec<&Node<'a>> = items.iter().map(|i| &self.nodes[*i]).collect();
        let [Node::Text("storage"), Node::Name(module, kind), key, _, Node::Int(elements)] = items[..] else {
            return broken("a storage is not described as PyTorch does");
        };
        let key = match key {
            Node::Text(key) => (*key).to_owned(),
            Node::Int(key) => key.to_string(),
            _ => return broken("a storage's key is no text"),
        };
        if !module.starts_with("torch") {
            return Err(Fault::Call(format!("{module}.{kind}")));
        }
        let Ok(elements) = u64::try_from(*elements) else { return broken("a storage has a negative size") };
        let node = Node::Storage(kind, key, elements);
        self.push(node);
        Ok(())
    }

    /// A call: of the few functions that put tensors together, by what they mean.
    fn call(&mut self) -> Step<()> {
        let (args, callee) = (self.pop()?, self.pop()?);
        let Node::Tuple(args) = &self.nodes[args] else { return broken("the arguments of a call are no tuple") };
        let Node::Name(module, name) = self.nodes[callee] else {
            return broken("its program calls what is no function");
        };
        let first = || args.first().map(|i| self.nodes[*i].clone());
        let node = match (module, name) {
            ("collections", "OrderedDict" | "defaultdict") => Some(Node::Dict(Vec::new())),
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3") => self.rebuild(args),
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => first(),
            ("torch", "Size" | "device") => Some(first().unwrap_or(Node::Tuple(Vec::new()))),
            ("torch._tensor", "_rebuild_from_type_v2") => match (first(), args.get(2).map(|i| &self.nodes[*i])) {
                (Some(Node::Name("torch._utils", "_rebuild_tensor_v2")), Some(Node::Tuple(args))) => self.rebuild(args),
                _ => None,
            },
            _ => return Err(Fault::Call(format!("{module}.{name}"))),
        };
        let Some(node) = node else { return broken(format!("the arguments of `{name}` are not as PyTorch has them")) };
        self.push(node);
        Ok(())
    }

    /// `(storage, offset, shape, strides, requires_grad, hooks[, dtype])`.
    fn rebuild(&self, args: &[usize]) -> Option<Node<'a>> {
        let Node::Storage(kind, key, elements) = self.nodes.get(*args.first()?)? else { return None };
        let typed = match args.get(6).map(|i| &self.nodes[*i]) {
            Some(Node::Name("torch", name)) => name,
            _ => kind,
        };
        let (dtype, size) = dtype(typed);
        let storage_size = if *kind == "UntypedStorage" { 1 } else { size };
        let Node::Int(offset) = self.nodes[*args.get(1)?] else { return None };
        let list = |at: usize| -> Option<Vec<u64>> {
            let Node::Tuple(items) = &self.nodes[*args.get(at)?] else { return None };
            let value = |i: &usize| if let Node::Int(n) = self.nodes[*i] { u64::try_from(n).ok() } else { None };
            (items.len() <= MOST_DIMS).then(|| items.iter().map(value).collect())?
        };
        let (shape, strides) = (list(2)?, list(3)?);
        (shape.len() == strides.len()).then_some(Node::Rebuilt(Box::new(Rebuilt {
            key: key.clone(),
            dtype,
            size,
            storage_bytes: elements.checked_mul(storage_size)?,
            offset: u64::try_from(offset).ok()?,
            shape,
            strides,
        })))
    }
}

/// The safetensors name and the bytes of an element of a storage class or a dtype of PyTorch's.
fn dtype(name: &str) -> (&'static str, u64) {
    match name {
        "FloatStorage" | "float32" => ("F32", 4),
        "BFloat16Storage" | "bfloat16" => ("BF16", 2),
        "HalfStorage" | "float16" => ("F16", 2),
        "DoubleStorage" | "float64" => ("F64", 8),
        "LongStorage" | "int64" => ("I64", 8),
        "IntStorage" | "int32" => ("I32", 4),
        "ShortStorage" | "int16" => ("I16", 2),
        "CharStorage" | "int8" => ("I8", 1),
        "ByteStorage" | "uint8" => ("U8", 1),
        "BoolStorage" | "bool" => ("BOOL", 1),
        "float8_e4m3fn" => ("F8_E4M3", 1),
        "float8_e5m2" => ("F8_E5M2", 1),
        _ => ("unknown", 1),
    }
}

fn state_dict(
    nodes: &[Node<'_>],
    root: usize,
    prefix: &str,
    entries: &HashMap<String, Range<usize>>,
) -> Step<HashMap<String, Tensor>> {
    let Node::Dict(mut dict) = nodes[root].clone() else { return broken("it holds no state dict") };
    let inner = ["model", "state_dict", "module"].iter().find_map(|name| {
        dict.iter().rev().find_map(|(key, value)| match (&nodes[*key], &nodes[*value]) {
            (Node::Text(key), Node::Dict(inner)) if key == name => Some(inner.clone()),
            _ => None,
        })
    });
    if let Some(inner) = inner {
        dict = inner;
    }
    let mut tensors = HashMap::new();
    for (key, value) in dict {
        // Whatever else stands beside the tensors, as a step number, says nothing of the model.
        if let (Node::Text(name), Node::Rebuilt(rebuilt)) = (&nodes[key], &nodes[value]) {
            tensors.insert((*name).to_owned(), place(name, rebuilt, prefix, entries)?);
        }
    }
    if tensors.is_empty() { broken("it holds no tensors") } else { Ok(tensors) }
}

/// Where a tensor's bytes are, if its storage is there and large enough and its elements lie in order.
fn place(name: &str, tensor: &Rebuilt, prefix: &str, entries: &HashMap<String, Range<usize>>) -> Step<Tensor> {
    let Some(storage) = entries.get(&format!("{prefix}data/{}", tensor.key)) else {
        return broken(format!("the bytes of tensor `{name}` are missing"));
    };
    let elements = tensor.shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
    let mut stride = Some(1u64);
    let in_order = elements == Some(0)
        || tensor.shape.iter().zip(&tensor.strides).rev().all(|(dim, got)| {
            let fits = *dim == 1 || Some(*got) == stride;
            stride = stride.and_then(|s| s.checked_mul(*dim));
            fits
        });
    if !in_order {
        return Err(Fault::View(format!("tensor `{name}` is a view whose elements are not in order")));
    }
    let start = tensor.offset.checked_mul(tensor.size);
    let end = elements.and_then(|n| n.checked_mul(tensor.size)).zip(start).and_then(|(n, start)| start.checked_add(n));
    let limit = tensor.storage_bytes.min(storage.len() as u64);
    match (start, end.filter(|end| *end <= limit)) {
        (Some(start), Some(end)) => Ok(Tensor {
            dtype: tensor.dtype,
            shape: tensor.shape.iter().map(|d| *d as usize).collect(),
            bytes: storage.start + start as usize..storage.start + end as usize,
        }),
        _ => broken(format!("tensor `{name}` reaches beyond its bytes")),
    }
}

#[cfg(test)]
mod tests {
    use super::write::program;
    use super::*;
    use crate::checkpoint::Dtype;
    use crate::checkpoint::archive::Writer;
    use crate::checkpoint::write::TensorInfo;

    fn info(name: &str, dtype: Dtype, shape: &[usize]) -> TensorInfo {
        TensorInfo { name: name.to_owned(), dtype, shape: shape.to_vec() }
    }

    fn saved() -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pth");
        let infos = [info("a", Dtype::F32, &[2, 3]), info("b", Dtype::Bf16, &[5]), info("c", Dtype::F16, &[])];
        save(&path, &infos, &[("tied", 0)], |i| Ok(vec![i as u8 + 1; [24, 10, 2][i]])).unwrap();
        std::fs::read(path).unwrap()
    }

    /// An archive around a program and one storage of 24 bytes.
    fn archive(program: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes);
        writer.add("archive/data.pkl", program).unwrap();
        writer.add("archive/data/0", &[0; 24]).unwrap();
        writer.finish().unwrap();
        bytes
    }

    fn read(program: &[u8]) -> Result<HashMap<String, Tensor>> {
        tensors(Path::new("x.pth"), &archive(program))
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = saved();
        let found = tensors(Path::new("x.pth"), &bytes).unwrap();
        let got =
            |name: &str| (found[name].dtype, found[name].shape.clone(), bytes[found[name].bytes.clone()].to_vec());
        assert_eq!(got("a"), ("F32", vec![2, 3], vec![1; 24]));
        assert_eq!(got("b"), ("BF16", vec![5], vec![2; 10]));
        assert_eq!(got("c"), ("F16", vec![], vec![3; 2]));
        assert_eq!(found["tied"], found["a"]);
    }

    /// Writes 9 GB where `TMPDIR` is: sizes and offsets beyond 32 bits.
    #[test]
    #[ignore = "writes 9 GB"]
    fn files_beyond_four_gigabytes_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let kept = std::env::var_os("LITGPT_BIG_FILE").map(std::path::PathBuf::from);
        let path = kept.unwrap_or_else(|| dir.path().join("big.pth"));
        let (big, small) = ((1usize << 31) + 33, 5);
        let infos =
            [info("big", Dtype::F16, &[big]), info("next", Dtype::F16, &[big]), info("last", Dtype::F32, &[small])];
        let fill = |i: usize| vec![[1u8, 2, 3][i]; [2 * big, 2 * big, 4 * small][i]];
        save(&path, &infos, &[], |i| Ok(fill(i))).unwrap();
        let shards = crate::checkpoint::safe::Shards::of(vec![path]).unwrap();
        for (i, name) in ["big", "next", "last"].into_iter().enumerate() {
            assert!(shards.get(name).unwrap().bytes == fill(i), "{name}");
        }
    }

    #[test]
    fn cut_and_changed_programs_are_one_line_errors() {
        let whole = program(&[info("a", Dtype::F32, &[2, 3])], &[]);
        assert_eq!(read(&whole).unwrap().len(), 1);
        for len in 0..whole.len() {
            let error = read(&whole[..len]).unwrap_err().to_string();
            assert!(!error.contains('\n'), "{error}");
        }
        for at in 0..whole.len() {
            for value in 0..=255 {
                let mut changed = whole.clone();
                changed[at] = value;
                let _ = read(&changed);
            }
        }
    }

    #[test]
    fn calls_of_anything_else_are_refused() {
        for program in [
            &b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."[..],
            b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93)R.",
        ] {
            let error = read(program).unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }), "{error}");
            assert!(error.to_string().contains("wants to call"), "{error}");
        }
    }

    #[test]
    fn sizes_are_checked_before_use() {
        for shape in [vec![7], vec![1 << 40, 1 << 40], vec![usize::MAX >> 1], vec![1; 9]] {
            let error = read(&program(&[info("a", Dtype::F32, &[2, 3])], &[])).map(|_| ());
            assert!(error.is_ok());
            let mut tensor = info("a", Dtype::F32, &[6]);
            tensor.shape = shape;
            let elements = |info: &TensorInfo| info.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
            if elements(&tensor).is_some() {
                assert!(read(&program(&[tensor], &[])).is_err());
            }
        }
        // A text of 4 GB, a number of 255 bytes, a value of a self-containing tuple.
        for program in [&b"\x80\x02X\xff\xff\xff\xff"[..], b"\x8a\xff", b"(q\x00t.", b"]q\x00h\x00a."] {
            assert!(read(program).is_err());
        }
    }

    #[test]
    fn doubling_programs_take_no_memory() {
        // Each round makes a pair of the pair before: 2^1000 leaves when written out.
        let mut program = b"\x80\x02K\x01".to_vec();
        for _ in 0..1000 {
            program.extend(b"q\x00h\x00\x86");
        }
        program.push(b'.');
        assert!(read(&program).is_err());
    }

    #[test]
    fn views_out_of_order_and_old_files_are_named() {
        let mut bytes = program(&[info("a", Dtype::F32, &[2, 3])], &[]);
        let at = bytes.windows(5).rposition(|w| w == b"J\x03\x00\x00\x00").unwrap();
        bytes[at + 1] = 2;
        assert!(read(&bytes).unwrap_err().to_string().contains("not in order"));
        let error = tensors(Path::new("x"), b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.").unwrap_err();
        assert!(error.to_string().contains("before 1.6") && error.hint().is_some());
    }
}
