//! `report.html`: one page about a run that needs nothing else: curves as inline SVG, summary, settings, examples. The
//! curves come from `metrics.csv`, so that a resumed run's page shows all of it.

use super::report::{Event, Report, Summary};
use crate::error::Error;
use serde_json::Value;
use std::fmt::Write;
use std::path::Path;

/// File of the page.
pub const FILE: &str = "report.html";
/// Width of a chart and height of its plot, in pixels.
const SIZE: (f64, f64) = (760.0, 220.0);
/// Room for the numbers at the left and below.
const MARGIN: (f64, f64) = (64.0, 26.0);
/// Most points of a curve.
const POINTS: usize = 1000;
/// Looks, by day and by night.
const STYLE: &str = "\
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--text:#1d2330;--soft:#667085;--line:#e3e6eb;\
--a:#1f6feb;--b:#d9480f;--c:#2b8a3e;--d:#8250df;--e:#0b7285}
@media(prefers-color-scheme:dark){:root{--page:#0f1318;--card:#181d25;--text:#e4e8ee;--soft:#93a0b1;--line:#2c343f;\
--a:#6cb2ff;--b:#ff9f5a;--c:#63d67f;--d:#c4a3ff;--e:#5fd3e6}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;max-width:860px;margin:0 auto;\
padding:28px 16px 48px;background:var(--page);color:var(--text)}
h1{font-size:24px;margin:0}h2{font-size:16px;margin:0 0 10px}h3{font-size:13px;margin:14px 0 4px;color:var(--soft)}
h1+p{margin:2px 0 18px;color:var(--soft)}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px;margin:0 0 16px}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:14px 18px;margin:0}
dt{color:var(--soft);font-size:13px}dd{margin:0;font-size:20px;font-variant-numeric:tabular-nums}
table{border-collapse:collapse;width:100%;font-size:14px}
td,th{padding:4px 14px 4px 0;text-align:left;border-top:1px solid var(--line);font-weight:400;overflow-wrap:anywhere}
th{color:var(--soft);width:45%}
pre{background:var(--page);border-radius:6px;padding:8px 10px;margin:0;white-space:pre-wrap;overflow-wrap:anywhere;\
font-size:13px}
summary{cursor:pointer;font-weight:600}details table{margin-top:10px}
svg{display:block}svg text{font-size:12px;fill:var(--soft)}
.grid{stroke:var(--line)}polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}
.a{--k:var(--a)}.b{--k:var(--b)}.c{--k:var(--c)}.d{--k:var(--d)}.e{--k:var(--e)}
polyline{stroke:var(--k)}circle{fill:var(--k)}svg text.key{fill:var(--k)}";

/// What the page says besides `metrics.csv`: the model's answers, in their order.
#[derive(Debug, Default)]
pub struct Page {
    examples: Vec<(usize, String)>,
}

/// A curve: name, class of its colour, points by step.
struct Curve {
    name: &'static str,
    colour: char,
    points: Vec<(f64, f64)>,
}

impl Report for Page {
    fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        if let Event::Example { step, text } = event {
            self.examples.push((*step, text.clone()));
        }
        Ok(())
    }
}

impl Page {
    /// Writes the page of the run in `out_dir`.
    ///
    /// # Errors
    /// When `metrics.csv` cannot be read or the page cannot be written.
    pub fn write(&self, out_dir: &Path, settings: &Value, summary: &Summary) -> Result<(), Error> {
        let metrics = out_dir.join("metrics.csv");
        let text = std::fs::read_to_string(&metrics).map_err(Error::io("read", &metrics))?;
        let curve = |name, colour| Curve { name, colour, points: column(&text, name) };
        let name = escaped(&out_dir.display().to_string());
        let model = settings.get("checkpoint_dir").and_then(Value::as_str).unwrap_or_default();
        let charts = [
            chart("Loss, nats a token", &[curve("loss", 'a'), curve("val_loss", 'b')]),
            chart("Learning rate", &[curve("learning_rate", 'c')]),
            chart("Tokens a second", &[curve("tokens_per_s", 'd')]),
            chart("Memory, GB", &[in_gigabytes(curve("memory", 'e'))]),
        ];
        let page = format!(
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\
             <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"/><title>Run in {name}</title>\
             <style>{STYLE}</style></head>\n<body><h1>Run in {name}</h1>\n<p>litgpt {}, {}</p>\n\
             {}{}{}{}</body></html>\n",
            env!("CARGO_PKG_VERSION"),
            escaped(model),
            self::summary(summary),
            charts.concat(),
            self.examples(),
            self::settings(settings),
        );
        // Whole or not at all.
        let partial = out_dir.join(format!(".partial-{FILE}"));
        std::fs::write(&partial, page).map_err(Error::io("write", &partial))?;
        std::fs::rename(&partial, out_dir.join(FILE)).map_err(Error::io("write", &out_dir.join(FILE)))
    }

    fn examples(&self) -> String {
        let mut out = String::new();
        for (step, text) in &self.examples {
            _ = write!(out, "<h3>After step {step}</h3>\n<pre>{}</pre>\n", escaped(text.trim()));
        }
        if out.is_empty() {
            out
        } else {
            format!("<section><h2>Answers to a validation sample</h2>\n{out}</section>\n")
        }
    }
}

/// Numbers of a column of `metrics.csv`, by step.
fn column(text: &str, name: &str) -> Vec<(f64, f64)> {
    let mut lines = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let header = lines.next().unwrap_or_default();
    let place = |name: &str| header.iter().position(|column| *column == name);
    let Some((step, value)) = place("step").zip(place(name)) else { return Vec::new() };
    let number = |line: &[&str], at: usize| line.get(at)?.parse().ok().filter(|n: &f64| n.is_finite());
    let points: Vec<(f64, f64)> = lines.filter_map(|line| number(&line, step).zip(number(&line, value))).collect();
    let every = points.len().div_ceil(POINTS).max(1);
    let last = points.len().saturating_sub(1);
    points.into_iter().enumerate().filter(|(i, _)| i % every == 0 || *i == last).map(|(_, point)| point).collect()
}

fn summary(summary: &Summary) -> String {
    let loss = |loss: Option<f64>| loss.map_or_else(|| "none".to_owned(), |loss| format!("{loss:.4}"));
    let rows = [
        ("End", if summary.stopped { "stopped by a signal" } else { "finished" }.to_owned()),
        ("Optimizer steps", summary.at.step.to_string()),
        ("Micro batches", summary.at.iter.to_string()),
        ("Tokens", summary.at.tokens.to_string()),
        ("Training time", format!("{:.1} s", summary.at.seconds)),
        ("Tokens a second", format!("{:.0}", summary.at.tokens as f64 / summary.at.seconds.max(1e-9))),
        ("Last validation loss", loss(summary.val_loss)),
        ("Best validation loss", loss(summary.at.best)),
    ];
    let cells: String =
        rows.iter().map(|(key, value)| format!("<div><dt>{key}</dt><dd>{value}</dd></div>\n")).collect();
    format!("<section><dl>{cells}</dl></section>\n")
}

fn settings(settings: &Value) -> String {
    let mut rows = Vec::new();
    flatten("", settings, &mut rows);
    let mut out = String::from("<section><details open=\"open\"><summary>Settings</summary><table>");
    for (key, value) in rows {
        _ = writeln!(out, "<tr><th>{}</th><td>{}</td></tr>", escaped(&key), escaped(&value));
    }
    out + "</table></details></section>\n"
}

/// Leaves of a tree by their dotted keys.
fn flatten(name: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                flatten(&name, value, rows);
            }
        }
        // What was left open says nothing about the run.
        Value::Null => {}
        Value::String(text) => rows.push((name.to_owned(), text.clone())),
        other => rows.push((name.to_owned(), other.to_string())),
    }
}

/// A curve of bytes in GB.
fn in_gigabytes(curve: Curve) -> Curve {
    Curve { points: curve.points.into_iter().map(|(step, bytes)| (step, bytes / 1e9)).collect(), ..curve }
}

/// Curves over the steps, with numbers at the axes.
fn chart(title: &str, curves: &[Curve]) -> String {
    let all: Vec<(f64, f64)> = curves.iter().flat_map(|curve| curve.points.clone()).collect();
    let Some(first) = all.first() else { return String::new() };
    let range = |of: fn(&(f64, f64)) -> f64| {
        let ends = |(low, high): (f64, f64), n: f64| (low.min(n), high.max(n));
        let (low, high) = all.iter().map(of).fold((of(first), of(first)), ends);
        if high > low { (low, high) } else { (low, low + low.abs().max(1.0)) }
    };
    let ((left, right), (low, high)) = (range(|p| p.0), range(|p| p.1));
    let ((width, height), (x0, below)) = (SIZE, MARGIN);
    let x = |step: f64| x0 + (step - left) / (right - left) * (width - x0 - 8.0);
    let y = |value: f64| 24.0 + (high - value) / (high - low) * (height - 24.0);
    let mut out = format!(
        "<section><h2>{title}</h2>\n<svg viewBox=\"0 0 {width} {}\" width=\"100%\" xmlns=\"http://www.w3.org/2000/svg\">\n",
        height + below
    );
    for quarter in 0..=4 {
        let value = low + (high - low) * f64::from(quarter) / 4.0;
        let (end, at) = (width - 8.0, y(value));
        _ = writeln!(out, "<line class=\"grid\" x1=\"{x0}\" x2=\"{end}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>");
        let place = format!("x=\"{}\" y=\"{:.1}\" text-anchor=\"end\"", x0 - 8.0, at + 4.0);
        _ = writeln!(out, "<text {place}>{}</text>", short(value));
    }
    for (step, anchor) in [(left, "start"), (right, "end")] {
        let place = format!("x=\"{:.1}\" y=\"{}\" text-anchor=\"{anchor}\"", x(step), height + 20.0);
        _ = writeln!(out, "<text {place}>step {step}</text>");
    }
    for (i, curve) in curves.iter().enumerate().filter(|(_, curve)| !curve.points.is_empty()) {
        let points: Vec<String> = curve.points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
        let last = curve.points.last().copied().unwrap_or_default();
        let (name, colour) = (curve.name, curve.colour);
        _ = writeln!(out, "<polyline class=\"{colour}\" points=\"{}\"/>", points.join(" "));
        _ = writeln!(out, "<circle class=\"{colour}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"/>", x(last.0), y(last.1));
        // Beside each other above the plot, where no curve is.
        let place = format!("x=\"{}\" y=\"12\" text-anchor=\"end\"", width - 8.0 - 190.0 * i as f64);
        _ = writeln!(out, "<text class=\"key {colour}\" {place}>{name}, last {}</text>", short(last.1));
    }
    out + "</svg></section>\n"
}

/// A number with as many digits as say something.
fn short(number: f64) -> String {
    match number.abs() {
        0.0 => "0".to_owned(),
        size if size >= 1e6 => format!("{number:.3e}"),
        size if size >= 100.0 => format!("{number:.0}"),
        size if size >= 1e-2 => format!("{number:.4}"),
        _ => format!("{number:.3e}"),
    }
}

/// Text as HTML, without what no page may hold.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() && !matches!(c, '\n' | '\t') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn long_curves_keep_their_ends() {
        let rows: String = (1..=5001).map(|step| format!("{step},{}\n", 2 * step)).collect();
        let points = column(&format!("step,loss\n{rows}"), "loss");
        assert!(points.len() <= POINTS + 1, "{}", points.len());
        assert_eq!((points[0], points[points.len() - 1]), ((1.0, 2.0), (5001.0, 10_002.0)));
        assert!(column("step,loss\n1,\n2,NaN\n", "loss").is_empty());
    }

    #[test]
    fn text_is_no_markup() {
        let page = Page { examples: vec![(3, "<script>alert(\"&\")</script>\u{1b}".to_owned())] };
        assert!(page.examples().contains("&lt;script&gt;alert(&quot;&amp;&quot;)&lt;/script&gt;\u{fffd}"));
        assert_eq!(chart("none", &[]), "");
    }
}
