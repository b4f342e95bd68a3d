--- @include lib/lease/read_run
--- @include lib/pool/places

local BLAMED = { CRASH = true, HANG = true, GPU_ERROR = true, GPU_OOM = true, HOST_OOM = true, WORKER_LOST = true }

local places = {}

-- Remember where a request failed, the last four places, if the place may be at fault: claims prefer others. job: of
-- read_run().
local function blame(job, worker, incarnation)
  places[incarnation] = places[incarnation] or where(incarnation, worker)
  local kept = { places[incarnation] }
  for line in string.gmatch(job.failed_on or '', '[^\n]+') do
    if line ~= kept[1] and #kept < 4 then kept[#kept + 1] = line end
  end
  change(job, 'failed_on', table.concat(kept, '\n'))
end
