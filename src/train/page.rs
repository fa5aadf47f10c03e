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
const SIZE: (f64, f64) = (760.0, 240.0);
/// Room for the numbers at the left and below.
const MARGIN: (f64, f64) = (70.0, 30.0);
/// Most points of a curve.
const POINTS: usize = 1000;
/// Looks.
const STYLE: &str = "body{font:15px/1.5 sans-serif;max-width:800px;margin:2em auto;padding:0 1em;color:#222}\
    table{border-collapse:collapse}td,th{padding:2px 14px 2px 0;text-align:left;border-bottom:1px solid #ddd}\
    pre{background:#f4f4f4;padding:8px;white-space:pre-wrap}svg text{font-size:12px;fill:#555}";

/// What the page says besides `metrics.csv`: the model's answers, in their order.
#[derive(Debug, Default)]
pub struct Page {
    examples: Vec<(usize, String)>,
}

/// A curve: name, colour, points by step.
struct Curve {
    name: &'static str,
    colour: &'static str,
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
        let page = format!(
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/><title>Run in {0}</title>\
             <style>{STYLE}</style></head>\n<body><h1>Run in {0}</h1>\n{1}{2}{3}{4}{5}</body></html>\n",
            escaped(&out_dir.display().to_string()),
            self::summary(summary),
            chart("Loss (nats a token)", &[curve("loss", "#1668b3"), curve("val_loss", "#c8510f")]),
            chart("Learning rate", &[curve("learning_rate", "#2a7f3f")]),
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
        if out.is_empty() { out } else { format!("<h2>Answers to a validation sample</h2>\n{out}") }
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
    table("Summary", rows.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
}

fn settings(settings: &Value) -> String {
    let mut rows = Vec::new();
    flatten("", settings, &mut rows);
    table("Settings", rows)
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
        Value::String(text) => rows.push((name.to_owned(), text.clone())),
        other => rows.push((name.to_owned(), other.to_string())),
    }
}

fn table(title: &str, rows: Vec<(String, String)>) -> String {
    let mut out = format!("<h2>{title}</h2>\n<table>");
    for (key, value) in rows {
        _ = writeln!(out, "<tr><th>{}</th><td>{}</td></tr>", escaped(&key), escaped(&value));
    }
    out + "</table>\n"
}

/// Curves over the steps, with numbers at the ends of the axes.
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
    let x = |step: f64| x0 + (step - left) / (right - left) * (width - x0 - 10.0);
    let y = |value: f64| 10.0 + (high - value) / (high - low) * (height - 10.0);
    let mut out = format!(
        "<h2>{title}</h2>\n<svg viewBox=\"0 0 {width} {}\" width=\"100%\" xmlns=\"http://www.w3.org/2000/svg\">\
         <rect x=\"{x0}\" y=\"10\" width=\"{}\" height=\"{}\" fill=\"none\" stroke=\"#ccc\"/>\n",
        height + below,
        width - x0 - 10.0,
        height - 10.0
    );
    for value in [high, (high + low) / 2.0, low] {
        _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            x0 - 6.0,
            y(value) + 4.0,
            short(value)
        );
    }
    for (step, anchor) in [(left, "start"), (right, "end")] {
        let step =
            format!("<text x=\"{:.1}\" y=\"{}\" text-anchor=\"{anchor}\">step {step}</text>", x(step), height + 18.0);
        _ = writeln!(out, "{step}");
    }
    for (i, curve) in curves.iter().enumerate().filter(|(_, curve)| !curve.points.is_empty()) {
        let points: Vec<String> = curve.points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
        let last = curve.points.last().map_or(0.0, |point| point.1);
        let (name, colour) = (curve.name, curve.colour);
        _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>",
            points.join(" ")
        );
        _ = writeln!(
            out,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\" fill=\"{colour}\"/>",
            x(curve.points[0].0),
            y(curve.points[0].1)
        );
        let place = format!("x=\"{}\" y=\"{}\"", width - 20.0, 28 + 16 * i);
        _ = writeln!(
            out,
            "<text {place} text-anchor=\"end\" style=\"fill:{colour}\">{name}, last {}</text>",
            short(last)
        );
    }
    out + "</svg>\n"
}

/// Four significant digits.
fn short(number: f64) -> String {
    if number == 0.0 || (1e-2..1e5).contains(&number.abs()) { format!("{number:.4}") } else { format!("{number:.3e}") }
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
