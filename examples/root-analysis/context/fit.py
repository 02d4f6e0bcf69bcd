"""Fill a histogram with a peak over a flat background, fit it, draw it."""

import json
from pathlib import Path

import ROOT

ROOT.gROOT.SetBatch(True)
mass = ROOT.TH1D("mass", "A peak;m [GeV];events", 60, 60.0, 120.0)
chance = ROOT.TRandom3(1)
for _ in range(4000):
    mass.Fill(chance.Gaus(91.2, 2.5))
for _ in range(2000):
    mass.Fill(chance.Uniform(60.0, 120.0))
shape = ROOT.TF1("shape", "gaus(0) + pol0(3)", 60.0, 120.0)
shape.SetParameters(500.0, 90.0, 3.0, 30.0)
found = mass.Fit(shape, "SQ")
canvas = ROOT.TCanvas("canvas", "", 800, 600)
mass.Draw("E")
canvas.SaveAs("mass.png")
peak = {"entries": mass.GetEntries(), "status": int(found), "mean": shape.GetParameter(1), "error": shape.GetParError(1)}
Path("fit.json").write_text(json.dumps({name: round(value, 3) for name, value in peak.items()}) + "\n")
