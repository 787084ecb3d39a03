{{/* Name of all objects, at most 45 characters, so that endings have room. */}}
{{- define "kiln.name" -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) (contains .Chart.Name .Release.Name) -}}
{{- .Values.fullnameOverride | default $full | trunc 45 | trimSuffix "-" -}}
{{- end -}}

{{/* Name of a track's objects: track is stable or canary. */}}
{{- define "kiln.trackName" -}}
{{- include "kiln.name" .root }}{{ if eq .track "canary" }}-canary{{ end -}}
{{- end -}}

{{- define "kiln.instance" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* What selects a track's pods, and nothing else of the release. */}}
{{- define "kiln.selector" -}}
{{ include "kiln.instance" .root }}
app.kubernetes.io/component: {{ .track }}
{{- end -}}

{{- define "kiln.labels" -}}
{{ include "kiln.instance" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{/* Of an image's values. */}}
{{- define "kiln.image" -}}
{{ .image.repository }}{{ with .image.digest }}@{{ . }}{{ else }}:{{ .image.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end -}}

{{- define "kiln.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (ternary (include "kiln.name" .) "default" .Values.serviceAccount.create) }}
{{- end -}}

{{- define "kiln.credentials" -}}
{{ .Values.credentials.existingSecret | default (ternary (printf "%s-credentials" (include "kiln.name" .)) "" (not (empty .Values.credentials.data))) }}
{{- end -}}

{{- define "kiln.tls" -}}
{{ .Values.tls.existingSecret | default (ternary (printf "%s-tls" (include "kiln.name" .)) "" (not (empty .Values.tls.certificate))) }}
{{- end -}}

{{/* The time to be taken off the endpoints, to drain, and to leave. */}}
{{- define "kiln.grace" -}}
{{ add .Values.preStopSeconds .Values.drainSeconds 5 }}
{{- end -}}

{{/* What a container needs wherever it runs: environment, resources, rights; port is the name of that of REST. */}}
{{- define "kiln.container" -}}
{{- $port := .port }}
{{- with .root -}}
env:
  - {name: HOME, value: /tmp}
  {{- range $name, $value := .Values.env }}
  - {name: {{ $name }}, value: {{ $value | quote }}}
  {{- end }}
{{- $credentials := include "kiln.credentials" . }}
{{- if or $credentials .Values.envFrom }}
envFrom:
  {{- with $credentials }}
  - secretRef: {name: {{ . }}}
  {{- end }}
  {{- with .Values.envFrom }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}
{{- $resources := deepCopy .Values.resources }}
{{- with .Values.gpu }}
{{- if .count }}{{ $_ := set $resources "limits" (set ($resources.limits | default dict) .resource (int .count)) }}{{ end }}
{{- end }}
resources: {{- toYaml $resources | nindent 2 }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  runAsUser: 10001
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
lifecycle:
  # Endpoints are taken off while this sleeps, so that no request meets a closed door.
  preStop: {sleep: {seconds: {{ .Values.preStopSeconds | int }}}}
startupProbe:
  httpGet: {path: /v2/health/live, port: {{ $port }}}
  {{- toYaml .Values.startupProbe | nindent 2 }}
readinessProbe:
  httpGet: {path: /v2/health/ready, port: {{ $port }}}
  {{- toYaml .Values.readinessProbe | nindent 2 }}
livenessProbe:
  httpGet: {path: /v2/health/live, port: {{ $port }}}
  {{- toYaml .Values.livenessProbe | nindent 2 }}
{{- end -}}
{{- end -}}

{{/* Volumes that every pod has, for the root filesystem cannot be written. */}}
{{- define "kiln.volumes" -}}
- name: cache
  {{- if .Values.cache.claim }}
  persistentVolumeClaim: {claimName: {{ .Values.cache.claim }}}
  {{- else if .Values.cache.sizeLimit }}
  emptyDir: {sizeLimit: {{ .Values.cache.sizeLimit }}}
  {{- else }}
  emptyDir: {}
  {{- end }}
- {name: tmp, emptyDir: {}}
{{- if and .Values.credentials.mountPath (include "kiln.credentials" .) }}
- name: credentials
  secret: {secretName: {{ include "kiln.credentials" . }}}
{{- end }}
{{- with .Values.extraVolumes }}{{ toYaml . | nindent 0 }}{{ end }}
{{- end -}}

{{- define "kiln.mounts" -}}
- {name: cache, mountPath: /cache}
- {name: tmp, mountPath: /tmp}
{{- if and .Values.credentials.mountPath (include "kiln.credentials" .) }}
- {name: credentials, mountPath: {{ .Values.credentials.mountPath }}, readOnly: true}
{{- end }}
{{- with .Values.extraVolumeMounts }}{{ toYaml . | nindent 0 }}{{ end }}
{{- end -}}

{{/* Where pods go. */}}
{{- define "kiln.placement" -}}
{{- $tolerations := .Values.tolerations }}
{{- if .Values.gpu.count }}
{{- $tolerations = append $tolerations (dict "key" .Values.gpu.resource "operator" "Exists" "effect" "NoSchedule") }}
{{- end }}
{{- with $tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What the schema cannot say: values that do not go together. */}}
{{- define "kiln.check" -}}
{{- $v := .Values }}
{{- if gt (len (compact (list $v.source.claim.name $v.source.image.reference $v.source.url))) 1 }}
{{- fail "source: at most one of claim.name, image.reference and url can be given" }}
{{- end }}
{{- if and $v.source.image.reference (semverCompare "<1.33.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "source.image: Kubernetes 1.33 or later is needed for image volumes, this is %s" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- if and $v.autoscaling.enabled $v.keda.enabled }}
{{- fail "autoscaling.enabled and keda.enabled: only one of them can decide how many pods there are" }}
{{- end }}
{{- if and $v.autoscaling.enabled (not (or $v.autoscaling.cpuPercent $v.autoscaling.queueRows $v.autoscaling.requestsInFlight)) }}
{{- fail "autoscaling: one of cpuPercent, queueRows and requestsInFlight must be more than 0" }}
{{- end }}
{{- if and $v.keda.enabled (not (or $v.keda.cpuPercent $v.keda.queueRows $v.keda.queueMs)) }}
{{- fail "keda: one of cpuPercent, queueRows and queueMs must be more than 0" }}
{{- end }}
{{- if and $v.monitoring.serviceMonitor.enabled $v.monitoring.podMonitor.enabled }}
{{- fail "monitoring: serviceMonitor and podMonitor would scrape every pod twice; enable one of them" }}
{{- end }}
{{- if and $v.gateway.enabled (not $v.gateway.parentRefs) (not $v.gateway.className) }}
{{- fail "gateway.parentRefs: routes need a Gateway to attach to; or give gateway.className to have one made" }}
{{- end }}
{{- if and $v.tls.certificate (not $v.tls.key) }}
{{- fail "tls.key: the key of tls.certificate is missing" }}
{{- end }}
{{- end -}}
