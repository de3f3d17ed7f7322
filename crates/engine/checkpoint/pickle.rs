//! A reader of torch's pickles that can run nothing.
//!
//! It knows the opcodes that pickle protocols 2 to 5 use for numbers, strings, tuples, lists and dictionaries, and four
//! callables: `torch._utils._rebuild_tensor_v2`, `torch._utils._rebuild_parameter`, `collections.OrderedDict` and
//! `torch.Size`. What training scripts leave beside the weights (optimisers, argparse namespaces, numpy scalars) becomes
//! an inert value; any other name is refused. Values live in an arena and refer to each other by index, so neither
//! nesting nor sharing can cost more than the file's own size.

use std::collections::HashMap;

/// A storage of the file: its values' type and the key of its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Storage {
    pub(super) kind: String,
    pub(super) key: String,
}

/// A tensor: a view of a storage, in values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tensor {
    pub(super) storage: Storage,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// Modules whose names training scripts leave in checkpoints; nothing in them is ever looked up.
const INERT: [&str; 6] = ["torch", "numpy", "argparse", "collections", "_codecs", "ruamel"];

type Handle = usize;

#[derive(Clone, Debug)]
enum Node {
    Other,
    Int(i64),
    Str(String),
    Sequence(Vec<Handle>),
    Dict(Vec<(Handle, Handle)>),
    Global(String),
    Storage(Storage),
    Tensor(Tensor),
}

/// Name and tensor of every entry of the state dict: the top level, or what it holds under `model` or `state_dict`.
pub(super) fn read(bytes: &[u8]) -> Result<Vec<(String, Tensor)>, String> {
    let mut machine = Machine { input: bytes, ..Machine::default() };
    let top = machine.run()?;
    let inner = ["model", "state_dict"].iter().find_map(|key| machine.item(top, key));
    let entries = match &machine.nodes[inner.unwrap_or(top)] {
        Node::Dict(entries) => entries,
        _ => return Err("its pickle is not a dictionary of tensors".to_owned()),
    };
    let named = entries.iter().filter_map(|(key, value)| match (&machine.nodes[*key], &machine.nodes[*value]) {
        (Node::Str(name), Node::Tensor(tensor)) => Some((name.clone(), tensor.clone())),
        _ => None,
    });
    Ok(named.collect())
}

#[derive(Default)]
struct Machine<'a> {
    input: &'a [u8],
    nodes: Vec<Node>,
    stack: Vec<Handle>,
    marks: Vec<usize>,
    memo: HashMap<u64, Handle>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Handle, String> {
        loop {
            let op = self.take(1)?[0];
            if op == b'.' {
                return self.pop();
            }
            self.step(op)?;
        }
    }

    fn step(&mut self, op: u8) -> Result<(), String> {
        match op {
            0x80 => self.take(1).map(drop),
            0x95 => self.take(8).map(drop),
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b'0' => self.pop().map(drop),
            b'1' => self.pop_mark().map(drop),
            b'2' => {
                let top = *self.stack.last().ok_or_else(empty)?;
                self.stack.push(top);
                Ok(())
            }
            b'J' | b'K' | b'M' | 0x8a | 0x8b | b'G' | b'N' | 0x88 | 0x89 | b'I' | b'L' | b'F' => self.scalar(op),
            b'X' | b'T' | b'B' | 0x8c | b'U' | b'C' | 0x8d | 0x8e | 0x96 | b'V' | b'S' => self.string(op),
            b')' | b't' | 0x85 | 0x86 | 0x87 | b']' | b'l' | b'}' | b'd' | 0x8f | 0x91 => self.collection(op),
            b'a' | b'e' | 0x90 => self.extend(op),
            b's' | b'u' => self.set_items(op),
            b'c' | 0x93 => self.global(op),
            b'R' | 0x81 => self.reduce(),
            b'b' => self.pop().map(drop),
            b'Q' => self.persistent(),
            b'q' | b'r' | b'p' | 0x94 | b'h' | b'j' | b'g' => self.memory(op),
            _ => Err(format!("its pickle has the opcode {op:#04x}, which torch does not write for tensors")),
        }
    }

    fn take(&mut self, count: usize) -> Result<&[u8], String> {
        let (taken, rest) = self.input.split_at_checked(count).ok_or("its pickle is cut short")?;
        self.input = rest;
        Ok(taken)
    }

    fn number(&mut self, bytes: usize) -> Result<u64, String> {
        let taken = self.take(bytes)?;
        Ok(taken.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn line(&mut self) -> Result<String, String> {
        let end = self.input.iter().position(|b| *b == b'\n').ok_or("its pickle is cut short")?;
        let line = String::from_utf8_lossy(&self.input[..end]).into_owned();
        self.input = &self.input[end + 1..];
        Ok(line)
    }

    fn push(&mut self, node: Node) {
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
    }

    fn pop(&mut self) -> Result<Handle, String> {
        self.stack.pop().ok_or_else(empty)
    }

    fn pop_mark(&mut self) -> Result<Vec<Handle>, String> {
        let mark = self.marks.pop().filter(|mark| *mark <= self.stack.len()).ok_or_else(empty)?;
        Ok(self.stack.split_off(mark))
    }

    fn pops(&mut self, count: usize) -> Result<Vec<Handle>, String> {
        let start = self.stack.len().checked_sub(count).ok_or_else(empty)?;
        Ok(self.stack.split_off(start))
    }

    fn scalar(&mut self, op: u8) -> Result<(), String> {
        let node = match op {
            b'J' => Node::Int(i64::from(self.number(4)? as u32 as i32)),
            b'K' => Node::Int(self.number(1)? as i64),
            b'M' => Node::Int(self.number(2)? as i64),
            0x8a | 0x8b => {
                let count = self.number(if op == 0x8a { 1 } else { 4 })? as usize;
                let bytes = self.take(count)?;
                let negative = bytes.last().is_some_and(|b| *b >= 0x80);
                // Larger integers (random states) are nothing a tensor needs.
                if count > 8 {
                    Node::Other
                } else {
                    let start = if negative { -1 } else { 0 };
                    Node::Int(bytes.iter().rev().fold(start, |value: i64, byte| value << 8 | i64::from(*byte)))
                }
            }
            b'G' => self.take(8).map(|_| Node::Other)?,
            b'I' | b'L' | b'F' => {
                let line = self.line()?;
                line.trim_end_matches('L').parse().map_or(Node::Other, Node::Int)
            }
            _ => Node::Other,
        };
        self.push(node);
        Ok(())
    }

    fn string(&mut self, op: u8) -> Result<(), String> {
        let text = match op {
            b'V' | b'S' => self.line()?,
            _ => {
                let prefix = match op {
                    b'X' | b'T' | b'B' => 4,
                    0x8c | b'U' | b'C' => 1,
                    _ => 8,
                };
                let count = usize::try_from(self.number(prefix)?).map_err(|_| "its pickle is cut short")?;
                String::from_utf8_lossy(self.take(count)?).into_owned()
            }
        };
        self.push(Node::Str(text));
        Ok(())
    }

    fn collection(&mut self, op: u8) -> Result<(), String> {
        let node = match op {
            b')' | b']' | 0x8f => Node::Sequence(Vec::new()),
            b'}' => Node::Dict(Vec::new()),
            0x85 => Node::Sequence(self.pops(1)?),
            0x86 => Node::Sequence(self.pops(2)?),
            0x87 => Node::Sequence(self.pops(3)?),
            b'd' => Node::Dict(pairs(&self.pop_mark()?)),
            _ => Node::Sequence(self.pop_mark()?),
        };
        self.push(node);
        Ok(())
    }

    fn extend(&mut self, op: u8) -> Result<(), String> {
        let mut items = if op == b'a' { self.pops(1)? } else { self.pop_mark()? };
        let list = *self.stack.last().ok_or_else(empty)?;
        if let Node::Sequence(list) = &mut self.nodes[list] {
            list.append(&mut items);
        }
        Ok(())
    }

    fn set_items(&mut self, op: u8) -> Result<(), String> {
        let items = if op == b's' { self.pops(2)? } else { self.pop_mark()? };
        let dict = *self.stack.last().ok_or_else(empty)?;
        if let Node::Dict(dict) = &mut self.nodes[dict] {
            dict.append(&mut pairs(&items));
        }
        Ok(())
    }

    fn global(&mut self, op: u8) -> Result<(), String> {
        let (module, name) = if op == b'c' {
            (self.line()?, self.line()?)
        } else {
            let (name, module) = (self.pop()?, self.pop()?);
            match (&self.nodes[module], &self.nodes[name]) {
                (Node::Str(module), Node::Str(name)) => (module.clone(), name.clone()),
                _ => return Err("its pickle names a callable by something that is no name".to_owned()),
            }
        };
        let package = module.split('.').next().unwrap_or_default();
        if !INERT.contains(&package) {
            return Err(format!(
                "its pickle asks for {module}.{name}, which no weights need: refused, nothing was run"
            ));
        }
        self.push(Node::Global(format!("{module}.{name}")));
        Ok(())
    }

    /// Calls one of the four known callables; any other gives an inert value.
    fn reduce(&mut self) -> Result<(), String> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let arguments = match &self.nodes[arguments] {
            Node::Sequence(arguments) => arguments.clone(),
            _ => Vec::new(),
        };
        let name = match &self.nodes[callable] {
            Node::Global(name) => name.as_str(),
            _ => "",
        };
        let node = match name {
            "torch._utils._rebuild_tensor_v2" => self.tensor(&arguments)?,
            "torch._utils._rebuild_parameter" => self.argument(&arguments, 0)?.clone(),
            "collections.OrderedDict" => Node::Dict(Vec::new()),
            "torch.Size" => self.argument(&arguments, 0)?.clone(),
            _ => Node::Other,
        };
        self.push(node);
        Ok(())
    }

    fn argument(&self, arguments: &[Handle], i: usize) -> Result<&Node, String> {
        arguments
            .get(i)
            .map(|handle| &self.nodes[*handle])
            .ok_or_else(|| "its pickle builds a tensor from too little".to_owned())
    }

    /// `_rebuild_tensor_v2(storage, offset, shape, strides, ...)`
    fn tensor(&self, arguments: &[Handle]) -> Result<Node, String> {
        let bad = || "its pickle builds a tensor from something else than a storage and a shape".to_owned();
        let Node::Storage(storage) = self.argument(arguments, 0)? else { return Err(bad()) };
        let Node::Int(offset) = self.argument(arguments, 1)? else { return Err(bad()) };
        Ok(Node::Tensor(Tensor {
            storage: storage.clone(),
            offset: usize::try_from(*offset).map_err(|_| bad())?,
            shape: self.sizes(self.argument(arguments, 2)?).ok_or_else(bad)?,
            strides: self.sizes(self.argument(arguments, 3)?).ok_or_else(bad)?,
        }))
    }

    fn sizes(&self, node: &Node) -> Option<Vec<usize>> {
        let Node::Sequence(items) = node else { return None };
        let size = |item: &Handle| match self.nodes[*item] {
            Node::Int(value) => usize::try_from(value).ok(),
            _ => None,
        };
        items.iter().map(size).collect()
    }

    /// A persistent id: `('storage', torch.FloatStorage, key, device, values)`.
    fn persistent(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let parts: Vec<&Node> = match &self.nodes[id] {
            Node::Sequence(parts) => parts.iter().map(|part| &self.nodes[*part]).collect(),
            _ => Vec::new(),
        };
        let storage = match parts.as_slice() {
            [Node::Str(tag), Node::Global(kind), Node::Str(key), ..] if tag == "storage" => {
                let kind = kind.rsplit('.').next().unwrap_or_default().to_owned();
                Storage { kind, key: key.clone() }
            }
            _ => return Err("its pickle refers to something else than a storage".to_owned()),
        };
        self.push(Node::Storage(storage));
        Ok(())
    }

    fn memory(&mut self, op: u8) -> Result<(), String> {
        let key = match op {
            b'q' | b'h' => self.number(1)?,
            b'r' | b'j' => self.number(4)?,
            0x94 => self.memo.len() as u64,
            _ => self.line()?.parse().map_err(|_| "its pickle has a memo key that is no number")?,
        };
        if matches!(op, b'h' | b'j' | b'g') {
            let value = *self.memo.get(&key).ok_or("its pickle recalls what it never stored")?;
            self.stack.push(value);
        } else {
            let top = *self.stack.last().ok_or_else(empty)?;
            self.memo.insert(key, top);
        }
        Ok(())
    }

    /// The dictionary under a string key of a dictionary.
    fn item(&self, dict: Handle, key: &str) -> Option<Handle> {
        let Node::Dict(entries) = &self.nodes[dict] else { return None };
        let named = |handle: &Handle| matches!(&self.nodes[*handle], Node::Str(name) if name == key);
        let found = entries.iter().find(|(key, _)| named(key)).map(|(_, value)| *value);
        found.filter(|value| matches!(self.nodes[*value], Node::Dict(_)))
    }
}

fn pairs(items: &[Handle]) -> Vec<(Handle, Handle)> {
    items.as_chunks::<2>().0.iter().map(|[key, value]| (*key, *value)).collect()
}

fn empty() -> String {
    "its pickle takes what it never put".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_of_anything_else_is_refused() {
        let evil = b"\x80\x02cos\nsystem\nq\0X\x10\0\0\0touch /tmp/pwned!q\x01\x85q\x02Rq\x03.";
        let error = read(evil).unwrap_err();
        assert!(error.contains("os.system"), "{error}");
        let evil = b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.";
        assert!(read(evil).unwrap_err().contains("builtins.eval"));
    }

    #[test]
    fn leftovers_of_training_are_inert() {
        let mut pickle =
            b"\x80\x02}q\0(X\x04\0\0\0argscargparse\nNamespace\n)\x81}X\x01\0\0\0aK\x01sbX\x05\0\0\0model}u.".to_vec();
        assert!(read(&pickle).unwrap().is_empty());
        pickle.pop();
        assert!(read(&pickle).unwrap_err().contains("cut short"));
    }

    #[test]
    fn every_prefix_and_every_single_byte_is_survived() {
        let good = b"\x80\x02ccollections\nOrderedDict\n)Rq\0(X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0\x30X\x03\0\0\0cpuK\x06tQK\0K\x02K\x03\x86K\x03K\x01\x86\x89N}tRu.";
        let tensors = read(good).unwrap();
        assert_eq!(tensors[0].0, "w");
        assert_eq!((tensors[0].1.shape.as_slice(), tensors[0].1.strides.as_slice()), (&[2, 3][..], &[3, 1][..]));
        for cut in 0..good.len() {
            assert!(read(&good[..cut]).is_err());
        }
        for at in 0..good.len() {
            for value in 0..=255 {
                let mut bad = good.to_vec();
                bad[at] = value;
                let _ = read(&bad);
            }
        }
    }
}
