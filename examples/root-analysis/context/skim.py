"""Keep the events of the tree with more momentum than is said, and draw it."""

import json
import sys
from pathlib import Path

import ROOT

ROOT.gROOT.SetBatch(True)
least = float(sys.argv[1])
source = ROOT.TFile("/context/data/events.root")
events = source.Get("events")
target = ROOT.TFile("skim.root", "RECREATE")
kept = events.CopyTree(f"pt > {least}")
kept.Write()
canvas = ROOT.TCanvas("canvas", "", 800, 600)
kept.Draw("pt")
canvas.SaveAs("momentum.png")
numbers = {"events": events.GetEntries(), "kept": kept.GetEntries(), "least": kept.GetMinimum("pt")}
Path("skim.json").write_text(json.dumps(numbers) + "\n")
target.Close()
