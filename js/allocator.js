// The settings of PyTorch's memory allocator; prestartup_script.py reads them at the next start.
import { app } from "../../scripts/app.js";
import { ALLOCATOR_SETTINGS } from "./allocator_core.js";

app.registerExtension({ name: "QwenVRAM.Allocator", settings: ALLOCATOR_SETTINGS });
